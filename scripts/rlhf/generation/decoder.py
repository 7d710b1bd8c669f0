"""The decode copy of a causal language model: a second set of weights and a forward, made for sampling.

Queries, keys and values are one layer, adapters are merged, and the forward is one loop. The trainer's
weights are copied into it before each rollout, in place, because CUDA graphs remember addresses.

The processes of a group may divide one copy by heads and by channels of the MLP (tensor parallelism): layers
that read the hidden state are split by outputs, layers that add to it by inputs, and the processes sum what
they add. Source: Shoeybi et al. 2019 (Megatron-LM), section 3.

Letters: H hidden size, D channels of a head, V vocabulary. Tensors have the model's dtype unless noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from rlhf import parallel
from rlhf.config.batch import exact_div
from rlhf.models import families, lora
from rlhf.models.sharding import gathered_parameters
from rlhf.parallel import Group

# (layer, queries, keys, values), each (..., heads, D) -> (..., heads, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear layer, or this process's shard of one."""

    weight: Tensor  # (outputs, inputs)
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., outputs)."""
        return F.linear(x, self.weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of the dtype of `x`, at least 0, in one kernel where there is a bias."""
        if self.bias is None:
            return F.relu(self(x))
        out = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t())
        return out.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Norm:
    """A layer norm, or a root-mean-square norm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., H) of the dtype of `x`, as transformers computes it."""
        if not self.rms:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) if self.weight is None else self.weight * scaled.to(x.dtype)


def add_norm(x: Tensor, added: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the sum `x` + `added`, and the norm of the sum, both (..., H) of the dtype of `x`.

    On CUDA the sum is written into `x` and `x` is returned, if the norm has a weight; otherwise `x` is kept.
    So use the returned sum, and `x` no more. `added` None is 0.
    """
    if x.device.type == "cuda" and norm.weight is not None:
        # Imported here: a CPU build of torch has no Triton.
        from rlhf.generation import kernels  # noqa: PLC0415

        return x, kernels.add_norm(x, added, norm.weight, norm.bias, norm.eps, norm.rms)
    x = x if added is None else x + added
    return x, norm(x)


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `up` holds the gate and the up projection where the MLP has a gate."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norms: tuple[Norm, Norm]


@dataclass(frozen=True)
class Weight:
    """A tensor of the copy, and the model's weights that fill it, concatenated along dimension 0."""

    target: Tensor
    names: tuple[str, ...]
    split: int | None  # the dimension that the processes of a group divide; None: each has all of it


class Decoder:
    """The decode copy of one model; `refresh` fills it. The processes of `group` compute together.

    Raises:
        UserError: they cannot divide the model evenly.
    """

    def __init__(self, model: Any, group: Group) -> None:
        families.refuse_uneven(model.config, group.size)
        config, layout = model.config, families.LAYOUTS[model.config.model_type]
        self.config, self.group, self.weights = config, group, list[Weight]()
        self._parameters, self._sources = dict(model.named_parameters()), dict[str, lora.Source]()
        self.dtype, self.device = model.dtype, parallel.device()
        heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.scale = self.head_dim**-0.5
        self.heads = exact_div(heads, group.size, "heads")
        self.kv_heads = exact_div(getattr(config, "num_key_value_heads", None) or heads, group.size, "heads")
        activation = getattr(config, "activation_function", None) or config.hidden_act
        self._activation, self._is_relu = ACT2FN[activation], activation == "relu"
        self._norm_first = getattr(config, "do_layer_norm_before", True)
        self._is_parallel = getattr(config, "use_parallel_residual", False)
        self.embedding = self._tensor(f"{layout.embedding}.weight")
        self.positions = self._optional(f"{layout.positions}.weight")
        self.project_in = self._optional(f"{layout.projections[0]}.weight")
        self.project_out = self._optional(f"{layout.projections[1]}.weight")
        self.layers = [self._layer(layout, layout.layer.format(i)) for i in range(config.num_hidden_layers)]
        self.norm = self._norm(layout.norm) if _has_module(model, layout.norm) else None
        head = next(n for n, p in self._parameters.items() if p is model.get_output_embeddings().weight)
        self.head = self.embedding if head == f"{layout.embedding}.weight" else self._tensor(head)
        self.rotary = _rotary_tables(model, self.device)
        self._refuse_unused()
        # Only a group of size 1 uses a CUDA graph: whether collectives work within one is not tested.
        self.uses_graph = self.device.type == "cuda" and group.size == 1

    @torch.no_grad()
    def refresh(self, model: Any) -> None:
        """Copy the weights of `model` into this copy, in place; one weight is gathered and merged at a time.

        All processes of a training call it together.
        """
        for weight in self.weights:
            start = 0
            for name in weight.names:
                if name not in self._sources:  # looked up once: that takes longer than copying
                    self._sources[name] = lora.source(model, name)
                with gathered_parameters(self._sources[name].parameters):
                    for part in self._parts(name, self._sources[name].merged()):
                        shard = self._shard(part, weight.split)
                        weight.target[start : start + len(shard)].copy_(shard)
                        start += len(shard)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return (..., H): the last hidden state.

        Args:
            ids: (...) int64 tokens.
            positions: (...) int64, of each token in its own sequence.
        """
        x, added = self._embed(ids, positions), None  # `added`: an output that the next norm adds to `x`
        for number, layer in enumerate(self.layers):
            first, second = layer.norms
            x, normed = add_norm(x, added, first) if self._norm_first else (x, x)
            qkv = layer.qkv(normed).unflatten(-1, (-1, self.head_dim))
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)  # (..., heads, D)
            if self.rotary is not None:
                q, k = self._rotate(q, positions), self._rotate(k, positions)
            attended = self._added(layer.out, attend(number, q, k, v).flatten(-2))
            if self._is_parallel:
                x = self._mlp(layer, second(x)) + attended + x
            elif self._norm_first:
                x, normed = add_norm(x, attended, second)
                added = self._mlp(layer, normed)
            else:
                x = first(x + attended)
                x = second(x + self._mlp(layer, x))
        if self.norm is None:
            return x if added is None else x + added
        return add_norm(x, added, self.norm)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., V) logits of (..., H) hidden states, both of the model's dtype."""
        if self.project_out is not None:
            hidden = F.linear(hidden, self.project_out)
        return F.linear(hidden, self.head)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        if self.project_in is not None:
            x = F.linear(x, self.project_in)
        offset = families.POSITION_OFFSET
        return x if self.positions is None else x + F.embedding(positions + offset, self.positions)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        if self._is_relu:
            return self._added(layer.down, layer.up.relu(x))
        up = layer.up(x)
        gate, *rest = up.chunk(2, -1) if layer.up.weight.shape[0] > layer.down.weight.shape[1] else (up,)
        return self._added(layer.down, self._activation(gate) * rest[0] if rest else self._activation(gate))

    def _added(self, layer: Linear, x: Tensor) -> Tensor:
        """Return the output of a layer that adds to the hidden state, summed over the group."""
        if self.group.size == 1:
            return layer(x)
        out = parallel.group_sum(F.linear(x, layer.weight), self.group)
        return out if layer.bias is None else out + layer.bias  # after the sum: once

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return (..., heads, D) with rotary position embeddings. Source: Su et al. 2021, section 3.4.2."""
        assert self.rotary is not None
        cos, sin = (F.embedding(positions, table)[..., None, :] for table in self.rotary)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        left, right = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-right, left], -1) * sin
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    # -- making the copy ----------------------------------------------------------------------

    def _tensor(self, *names: str, split: int | None = None) -> Tensor:
        """Return a tensor that `refresh` fills with weights of the model, concatenated along dimension 0."""
        shapes = [_shape(self._parameters[name]) for name in names]
        rows = sum(shape[0] for shape in shapes)
        sizes = [rows, *shapes[0][1:]]
        if split is not None:
            sizes[split] = exact_div(sizes[split], self.group.size, names[0])
        target = torch.empty(sizes, dtype=self.dtype, device=self.device)
        self.weights.append(Weight(target, names, split))
        return target

    def _optional(self, name: str) -> Tensor | None:
        return self._tensor(name) if name in self._parameters else None

    def _linear(self, names: Sequence[str], split: int) -> Linear:
        """Return a layer that is split by outputs (0) with its bias, or by inputs (1) with a whole bias."""
        biases = [f"{name}.bias" for name in names]
        has_bias = biases[0] in self._parameters
        bias = self._tensor(*biases, split=0 if split == 0 else None) if has_bias else None
        return Linear(self._tensor(*(f"{name}.weight" for name in names), split=split), bias)

    def _layer(self, layout: families.Layout, prefix: str) -> Layer:
        return Layer(
            qkv=self._linear([prefix + name for name in layout.qkv], 0),
            out=self._linear([prefix + layout.out], 1),
            up=self._linear([prefix + name for name in layout.up], 0),
            down=self._linear([prefix + layout.down], 1),
            norms=(self._norm(prefix + layout.norms[0]), self._norm(prefix + layout.norms[1])),
        )

    def _norm(self, name: str) -> Norm:
        rms = getattr(self.config, "rms_norm_eps", None)
        eps = rms if rms is not None else getattr(self.config, "layer_norm_eps", 1e-5)
        return Norm(self._optional(f"{name}.weight"), self._optional(f"{name}.bias"), eps, rms is not None)

    def _parts(self, name: str, weight: Tensor) -> Sequence[Tensor]:
        """Return the parts of a weight that a group splits one by one.

        GPT-NeoX's `query_key_value` has queries, keys and values of each head in turn: they are three parts.
        """
        if not name.rpartition(".")[0].endswith("query_key_value"):
            return [weight]
        by_head = weight.view(self.config.num_attention_heads, 3, self.head_dim, *weight.shape[1:])
        return by_head.transpose(0, 1).flatten(1, 2).unbind(0)

    def _refuse_unused(self) -> None:
        """Assert that the layout names all weights: one that it lacks would be left out in silence."""
        used = {name for weight in self.weights for name in weight.names}
        unused = [name for name in self._parameters if name not in used and not lora.is_adapter(name)]
        assert not unused, f"the layout of {self.config.model_type} lacks {', '.join(unused)}"
        self._parameters = {}  # not kept: an engine may replace parameters before the first `refresh`

    def _shard(self, weight: Tensor, split: int | None) -> Tensor:
        """Return this process's shard of a whole weight."""
        if split is None or self.group.size == 1:
            return weight
        size = weight.shape[split] // self.group.size
        return weight.narrow(split, self.group.position * size, size)


def _has_module(model: Any, path: str) -> bool:
    """Return whether a model has a module. OPT-350M has no last norm: its attribute is None."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name, None) is not None


def _shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, which ZeRO-3 may hold in shards."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _rotary_tables(model: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return cosines and sines of every position, both (positions, rotated channels), or None."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return None
    positions = torch.arange(model.config.max_position_embeddings, device=rotary.inv_freq.device)
    cos, sin = rotary(torch.empty(0, dtype=model.dtype, device=positions.device), positions[None])
    return cos[0].to(device).contiguous(), sin[0].to(device).contiguous()
