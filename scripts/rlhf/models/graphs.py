"""CUDA graphs of a model's body, forward and backward, for small packed micro-batches.

A pass over few tokens waits for Python, which launches some ten kernels per layer. A graph launches all of
them at once. Graphs have fixed shapes: packed rows become one row, filled up to the next of a few lengths.

Letters: B rows of a batch, T tokens of a row, S runs, N tokens of the filled row, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rlhf.data.tokens import Packed
from rlhf.models import packing

FILLING = 4  # at most this part of a row is filled up
RUNS, LONGEST = 64, 512  # shapes have multiples of these
LARGEST = 16384  # tokens; from here on the GPU has more to do than Python


class BodyGraphs:
    """The graphs of one model, which are captured as shapes come up.

    They share one pool of memory. It serves smaller shapes after larger ones, not the reverse: where a shape
    is larger than all before, earlier graphs are dropped, and captured again when they are needed.

    The model must attend by kernels of variable length, and its parameters must stay where they are: it is
    not for ZeRO-3.
    """

    def __init__(self, model: Any) -> None:
        self._body: nn.Module = model.base_model
        self._parameters = [p for p in self._body.parameters() if p.requires_grad]
        # Other names of the same memory: gradients of the parameters themselves wait for the stream on which
        # DeepSpeed has looked at them, which a capture must not.
        self._aliases = {
            name: p.detach().requires_grad_(p.requires_grad) for name, p in self._body.named_parameters()
        }
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._pool: Any = None
        self._is_warm = False
        self._stream = torch.cuda.Stream()
        device, dtype = self._parameters[0].device, self._parameters[0].dtype
        # One buffer for all graphs, filled by the newest backward pass.
        self._gradients = torch.empty(sum(p.numel() for p in self._parameters), dtype=dtype, device=device)

    def fits(self, batch: Packed) -> bool:
        """Return whether a batch is small enough, and gradients are on: graphs compute both passes."""
        return torch.is_grad_enabled() and batch.ids.numel() <= LARGEST

    def __call__(self, batch: Packed) -> Tensor:
        """Return the last hidden state, (B, T, H) of the model's dtype.

        Do its backward pass before the next call, which overwrites it.
        """
        tokens, runs = batch.ids.numel(), len(batch.boundaries) - 1
        # The row's filling is one run more.
        key = (_length(tokens + 1), _rounded(runs + 1, RUNS), _rounded(batch.longest, LONGEST))
        if key not in self._graphs:
            if key[0] > max((length for length, *_ in self._graphs), default=0):
                self._graphs.clear()
                self._pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = self._captured(*key)
        graph = self._graphs[key]
        graph.fill(batch)
        arguments = (graph, self._gradients, *self._parameters)
        hidden: Tensor = _Replayed.apply(*arguments)  # type: ignore[no-untyped-call]
        return hidden[0, :tokens].view(*batch.ids.shape, -1)

    def _captured(self, tokens: int, runs: int, longest: int) -> _Graph:
        device = self._gradients.device
        ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
        ends = torch.full((runs + 1,), tokens, dtype=torch.int32, device=device)
        ends[0] = 0
        positions, trained = torch.zeros_like(ids), [p for p in self._aliases.values() if p.requires_grad]

        def forward() -> Tensor:
            inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            inputs |= packing.kernel_inputs(ends, max(longest, tokens // FILLING))
            hidden: Tensor = functional_call(self._body, self._aliases, kwargs=inputs).last_hidden_state
            return hidden

        def backward(hidden: Tensor, gradient: Tensor) -> None:
            found = torch.autograd.grad(hidden, trained, gradient, materialize_grads=True)
            torch.cat([g.reshape(-1) for g in found], out=self._gradients)

        if not self._is_warm:  # libraries are set up before a capture
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                hidden = forward()
                backward(hidden, torch.zeros_like(hidden))
                del hidden
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_warm = True
        there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(there, pool=self._pool, stream=self._stream):
            hidden = forward()
        gradient = torch.zeros_like(hidden)
        with torch.cuda.graph(back, pool=self._pool, stream=self._stream):
            backward(hidden, gradient)
        return _Graph(ids, positions, ends, hidden.detach(), gradient, there, back)


@dataclass(frozen=True)
class _Graph:
    """Two graphs of one shape, and the tensors that they read and write."""

    ids: Tensor  # (1, N) int64
    positions: Tensor  # (1, N) int64
    ends: Tensor  # (S + 1,) int32
    hidden: Tensor  # (1, N, H)
    gradient: Tensor  # (1, N, H) of `hidden`
    forward: Any
    backward: Any

    def fill(self, batch: Packed) -> None:
        """Copy a batch; what it leaves of the row is one run, and further runs are empty."""
        tokens, ends = batch.ids.numel(), len(batch.boundaries)
        room = self.ids.shape[1]
        self.ids.copy_(F.pad(batch.ids.view(1, -1), (0, room - tokens)))
        self.positions.copy_(F.pad(batch.positions.view(1, -1), (0, room - tokens)))
        self.ends.copy_(F.pad(batch.boundaries, (0, len(self.ends) - ends), value=room))


class _Replayed(torch.autograd.Function):
    """The hidden state by a replay of one graph, parameters' gradients by a replay of the other."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, gradients: Tensor, *parameters: Tensor) -> Tensor:
        graph.forward.replay()
        ctx.graph, ctx.gradients = graph, gradients
        ctx.shapes = [p.shape for p in parameters]
        return graph.hidden.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graph.gradient.copy_(gradient)
        ctx.graph.backward.replay()
        # Copied: what a parameter accumulates must not change with the next replay.
        parts = ctx.gradients.clone().split([s.numel() for s in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def _length(tokens: int) -> int:
    """Return the next length from `tokens` on: a power of two, or a quarter, half or three quarters more."""
    power = max(256, 1 << (tokens.bit_length() - 1))
    return _rounded(tokens, power // FILLING)


def _rounded(count: int, step: int) -> int:
    """Return `count`, rounded up to a multiple of `step`."""
    return -(-count // step) * step
