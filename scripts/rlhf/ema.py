"""An exponential mean of the weights that are trained, in 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.sharding import is_sharded


class Ema:
    """The mean of a model's trained weights; under ZeRO-3 every process keeps that of its shards."""

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self.is_sharded = is_sharded(model)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.means = {name: _own_part(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold in the weights after an optimizer step."""
        for name, mean in self.means.items():
            mean.lerp_(_own_part(self._parameters[name]).float(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the model for the block."""
        kept = {name: _own_part(p).detach().clone() for name, p in self._parameters.items()}
        self._assign(self.means)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            _own_part(parameter).copy_(values[name])
            if self.is_sharded:
                parameter.partition()  # one that was gathered is old now: it is gathered anew when used


def _own_part(parameter: Any) -> Tensor:
    """Return what this process holds of a parameter: its shard, or all of one that is not sharded."""
    part: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
    return part
