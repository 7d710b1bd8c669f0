"""LoRA: low-rank adapters beside frozen weights, merged into them when a model is published.

An adapted layer keeps the names of its weight and bias, so a published model has the same names as the
model without adapters. Letters: R rank of an adapter (`dim`), I and O inputs and outputs of a
linear layer.

Source: Hu et al., LoRA, 2021, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.config.training import Lora
from rlhf.errors import DataError
from rlhf.models import families

HEAD = "score"  # a scorer's head, which is always trained because it starts from random weights


class _AdaptedLinear(torch.autograd.Function):
    """W x + b + scale * B (A x), with products that add to their output: on small batches launches cost most.

    The weight is frozen and gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low_rank = F.linear(x, a).mul_(scale).flatten(0, -2)  # (tokens, R)
        out = F.linear(x, weight, bias)  # (..., O)
        out.flatten(0, -2).addmm_(low_rank, b.t())
        ctx.save_for_backward(x, weight, a, b, low_rank)
        ctx.scale, ctx.has_bias = scale, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low_rank = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (tokens, O)
        grad_low = (flat @ b).mul_(ctx.scale)  # (tokens, R)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).addmm_(grad_low, a).view_as(x)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        grad_a = grad_low.t() @ x.flatten(0, -2)  # (R, I)
        grad_b = flat.t() @ low_rank  # (O, R)
        return grad_x, None, grad_bias, grad_a, grad_b, None


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition: W x + b + alpha / dim * B (A x), with A (R, I) and B (O, R)."""

    def __init__(self, base: nn.Linear, dim: int, alpha: float, noise: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        dtype, device = base.weight.dtype, base.weight.device
        bound = 1 / math.sqrt(base.in_features)
        # Drawn in 32 bits on the CPU: the same numbers for every dtype and device.
        initial = torch.empty(dim, base.in_features).uniform_(-bound, bound, generator=noise)  # (R, I)
        self.lora_A = nn.Parameter(initial.to(dtype=dtype, device=device))
        # Zeros, so that training starts from the model without adapters.
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, dim, dtype=dtype, device=device))  # (O, R)
        self.scale, self.active = alpha / dim, True

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (..., O) for an input of shape (..., I), both of the weight's dtype."""
        if not self.active:
            return F.linear(x, self.weight, self.bias)
        arguments = (x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
        out: Tensor = _AdaptedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
        return out

    def merged(self) -> Tensor:
        """Return (O, I) of the weight's dtype, summed in float32: the weight of an equal plain layer."""
        return torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale)  # (O, R) @ (R, I)


def add(model: Any, config: Lora, seed: int) -> None:
    """Add adapters to the target layers of `model`, whose own weights are frozen.

    With `config.only`, everything else is frozen too, except a scorer's head.

    Raises:
        DataError: a target matches no linear layer, or the family is unknown and there are no targets.
    """
    targets = config.targets or families.linear_layers(model.config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = {name: layer for name, layer in linear.items() if _matches(name, targets)}
    if unmatched := [t for t in targets if not any(_matches(name, (t,)) for name in adapted)]:
        names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise DataError(
            f"lora.targets: {', '.join(unmatched)} matches no linear layer of this {model.config.model_type}"
            f" model: choose from {', '.join(names)}"
        )
    if config.only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] == HEAD)
    noise = torch.Generator().manual_seed(seed)
    for name, layer in adapted.items():
        parent, _, attribute = name.rpartition(".")
        adapter = LoraLinear(layer, config.dim, config.alpha, noise)
        setattr(model.get_submodule(parent), attribute, adapter)


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    """Return whether a module's path is one of the targets, or ends with `.` and a target."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return path -> layer of all layers with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute without adapters within the block, as the model did before they were added."""
    adapted = layers(model).values()
    for layer in adapted:
        layer.active = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.active = True


@dataclass(frozen=True)
class Source:
    """What a published weight is computed from: a parameter and, if its layer has an adapter, the layer."""

    weight: Tensor  # (O, I) of a linear layer
    layer: LoraLinear | None

    @property
    def parameters(self) -> list[Tensor]:
        """The weight and the adapter's A (R, I) and B (O, R), all of one dtype; under ZeRO-3, gather them."""
        return [self.weight] if self.layer is None else [self.weight, self.layer.lora_A, self.layer.lora_B]

    def merged(self) -> Tensor:
        """Return the weight, of its shape and dtype, with its adapter merged."""
        return self.weight if self.layer is None else self.layer.merged()


def source(model: nn.Module, name: str) -> Source:
    """Return what the published weight `name` of a model is computed from."""
    layer = model.get_submodule(name.rpartition(".")[0])
    adapted = layer if isinstance(layer, LoraLinear) and name.endswith("weight") else None  # not a bias
    return Source(model.get_parameter(name), adapted)


def peft_config(model: Any, config: Lora, base: str) -> dict[str, Any]:
    """Return the content of PEFT's `adapter_config.json`.

    Args:
        base: path of the model without adapters.

    Raises:
        DataError: there are no targets and the family is unknown.
    """
    generates = model.can_generate()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": config.dim,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(config.targets or families.linear_layers(model.config)),
        "modules_to_save": None if generates else [HEAD],
        "inference_mode": True,
    }
