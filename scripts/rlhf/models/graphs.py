"""CUDA graphs of a model's body, forward and backward, for small micro-batches.

A pass over few tokens waits for Python, which launches some ten kernels per layer. A graph launches all of
them at once. Graphs have fixed shapes: rows are filled up to the next of a few lengths, packed ones as one row.

Letters: B rows of a batch, T tokens of a row, S runs, M rows of a graph, N tokens of its rows, H hidden size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from rlhf.data.tokens import Packed, Padded
from rlhf.models import lora, packing
from rlhf.models.sharding import is_sharded

FILLING = 4  # at most this part of a packed row is filled up
RUNS, LONGEST = 64, 512  # shapes have multiples of these
COLUMNS = 64  # padded rows have a multiple of these
LONG = 8192  # tokens; see `_length`
LARGEST = 16384  # tokens; from here on the GPU has more to do than Python


def use_graphs(model: Any) -> None:
    """Let a model compute small micro-batches by graphs, if it can."""
    if packing.uses_kernel(model) and not is_sharded(model) and not model.is_gradient_checkpointing:
        model.body_graphs = BodyGraphs(model)


class _Memory:
    """The pool of memory of all graphs in this process, which are replayed one after another.

    It serves smaller passes after larger ones, not the reverse: where a pass is larger than all before, all
    graphs are dropped, and captured again when they are needed.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.largest = 0
        self.models: weakref.WeakSet[BodyGraphs] = weakref.WeakSet()

    def reserve(self, size: int) -> None:
        """Make sure that a pass of `size` can be captured."""
        if size > self.largest:
            for model in self.models:
                model.graphs.clear()
            self.pool, self.largest = torch.cuda.graph_pool_handle(), size


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for."""

    rows: int
    tokens: int  # of each row
    runs: int  # of packed rows, else 0
    longest: int  # run
    learns: bool  # with a backward pass

    @classmethod
    def of(cls, batch: Packed | Padded, learns: bool) -> Shape:
        """Return the smallest shape that holds a batch."""
        rows, tokens = batch.ids.shape
        if isinstance(batch, Padded):
            return cls(rows, _rounded(tokens, COLUMNS), 0, 0, learns)
        length = _length(rows * tokens)
        # The row's filling is one run, and may be the longest.
        runs = _rounded(len(batch.boundaries), RUNS)
        return cls(1, length, runs, max(_rounded(batch.longest, LONGEST), length // FILLING), learns)


_memory = _Memory()


class BodyGraphs:
    """The graphs of one model, which are captured as shapes come up.

    Where a model learns nothing there is no backward pass: it is frozen, or its adapters are disabled.

    The model must attend by kernels of variable length, and its parameters must stay where they are: it is
    not for ZeRO-3.
    """

    def __init__(self, model: Any) -> None:
        self._body: Any = model.base_model
        self._adapted = list(lora.layers(self._body).values())
        self._weight = model.config.num_hidden_layers * model.config.hidden_size  # memory per token, relative
        trained = {name: p for name, p in self._body.named_parameters() if p.requires_grad}
        # Where they are looked up at each call: an engine may put other tensors of the same values there.
        self._places = [
            (self._body.get_submodule(module)._parameters, name)
            for module, _, name in (path.rpartition(".") for path in trained)
        ]
        # Other names of the same memory: gradients of the parameters themselves wait for the stream on which
        # DeepSpeed has looked at them, which a capture must not.
        self._aliases = {
            name: p.detach().requires_grad_(p.requires_grad) for name, p in self._body.named_parameters()
        }
        self.graphs: dict[Shape, _Graph] = {}
        _memory.models.add(self)
        self._warm = set[bool]()  # of the kinds, with and without a backward pass
        self._stream = torch.cuda.Stream()
        first = next(self._body.parameters())
        # One buffer for all graphs, filled by the newest backward pass.
        self._gradients = first.new_empty(sum(p.numel() for p in trained.values()), requires_grad=False)

    def fits(self, batch: Packed | Padded) -> bool:
        """Return whether a batch is small enough, and without padding before a token."""
        return batch.ids.numel() <= LARGEST and (isinstance(batch, Packed) or batch.left_aligned)

    def __call__(self, batch: Packed | Padded) -> Tensor:
        """Return the last hidden state, (B, T, H) of the model's dtype.

        Do its backward pass before the next call, which overwrites it.
        """
        shape = Shape.of(batch, bool(self._places) and all(layer.active for layer in self._adapted))
        if shape not in self.graphs:
            _memory.reserve(shape.rows * shape.tokens * (self._weight if shape.learns else 1))
            self.graphs[shape] = self._captured(shape)
        graph = self.graphs[shape]
        graph.fill(batch)
        if shape.learns:
            arguments = (graph, self._gradients, *(parameters[name] for parameters, name in self._places))
            hidden: Tensor = _Replayed.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            graph.forward.replay()
            hidden = graph.hidden
        if isinstance(batch, Padded):
            return hidden[:, : batch.ids.shape[1]]
        return hidden[0, : batch.ids.numel()].view(*batch.ids.shape, -1)

    def _captured(self, shape: Shape) -> _Graph:
        device = self._gradients.device
        ids = torch.zeros((shape.rows, shape.tokens), dtype=torch.long, device=device)
        positions = torch.zeros_like(ids)
        if not shape.runs:  # known; those of columns that fill up may be beyond the last
            known = torch.arange(shape.tokens, device=device)
            positions += known.clamp(max=self._body.config.max_position_embeddings - 1)
        ends = torch.full((shape.runs + 1,), shape.tokens, dtype=torch.int32, device=device)
        ends[0] = 0
        trained = [p for p in self._aliases.values() if p.requires_grad]

        def forward(ids: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
            inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            if shape.runs:
                inputs |= packing.kernel_inputs(ends, shape.longest)
            hidden: Tensor = functional_call(self._body, self._aliases, kwargs=inputs).last_hidden_state
            return hidden

        def backward(hidden: Tensor, gradient: Tensor) -> None:
            found = torch.autograd.grad(hidden, trained, gradient, materialize_grads=True)
            torch.cat([g.reshape(-1) for g in found], out=self._gradients)

        def warm_up() -> None:  # by few tokens
            hidden = forward(ids[:1, :COLUMNS], positions[:1, :COLUMNS], ends.clamp(max=COLUMNS))
            if shape.learns:
                backward(hidden, torch.zeros_like(hidden))

        with torch.set_grad_enabled(shape.learns):
            if shape.learns not in self._warm:  # libraries are set up before a capture
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    warm_up()
                torch.cuda.current_stream().wait_stream(self._stream)
                self._warm.add(shape.learns)
            there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(there, pool=_memory.pool, stream=self._stream):
                hidden = forward(ids, positions, ends)
            gradient = torch.zeros_like(hidden)
            if shape.learns:
                with torch.cuda.graph(back, pool=_memory.pool, stream=self._stream):
                    backward(hidden, gradient)
        return _Graph(ids, positions, ends, hidden.detach(), gradient, there, back)


@dataclass(frozen=True)
class _Graph:
    """Two graphs of one shape, and the tensors that they read and write."""

    ids: Tensor  # (M, N) int64
    positions: Tensor  # (M, N) int64
    ends: Tensor  # (S + 1,) int32 of packed rows
    hidden: Tensor  # (M, N, H)
    gradient: Tensor  # (M, N, H) of `hidden`
    forward: Any
    backward: Any

    def fill(self, batch: Packed | Padded) -> None:
        """Copy a batch. What it leaves of a packed row is one run, and further runs are empty."""
        room = self.ids.shape[1]
        if isinstance(batch, Padded):  # what it leaves of its rows comes after all that is used
            self.ids[:, : batch.ids.shape[1]] = batch.ids
            return
        tokens, ends = batch.ids.numel(), len(batch.boundaries)
        self.ids.copy_(F.pad(batch.ids.view(1, -1), (0, room - tokens)))
        self.positions.copy_(F.pad(batch.positions.view(1, -1), (0, room - tokens)))
        self.ends.copy_(F.pad(batch.boundaries, (0, len(self.ends) - ends), value=room))


class _Replayed(torch.autograd.Function):
    """The hidden state by a replay of one graph, parameters' gradients by a replay of the other."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, gradients: Tensor, *parameters: Tensor) -> Tensor:
        graph.forward.replay()
        ctx.graph, ctx.gradients = graph, gradients
        ctx.shapes, ctx.has_leaves = [p.shape for p in parameters], any(p.is_leaf for p in parameters)
        return graph.hidden.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graph.gradient.copy_(gradient)
        ctx.graph.backward.replay()
        # Copied for leaves: what they accumulate must not change with the next replay.
        gradients = ctx.gradients.clone() if ctx.has_leaves else ctx.gradients
        parts = gradients.split([s.numel() for s in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _length(tokens: int) -> int:
    """Return the next length from `tokens` on: a power of two, or one or more quarters more.

    Of long rows eighths: there the GPU computes the filling, and does not wait for Python meanwhile.
    """
    power = max(256, 1 << (tokens.bit_length() - 1))
    return _rounded(tokens, power // (2 * FILLING if power >= LONG else FILLING))


def _rounded(count: int, step: int) -> int:
    """Return `count`, rounded up to a multiple of `step`."""
    return -(-count // step) * step
