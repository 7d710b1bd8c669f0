"""An exponential moving average of the trained weights, in 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.models.sharding import is_sharded


class Ema:
    """The moving average of a model's trained weights. Under ZeRO-3 each process averages its own shards.

    `means` is parameter name -> float32 tensor, with the shape of what this process holds of the parameter.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self.is_sharded = is_sharded(model)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.means = {name: _local(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step, set each mean to decay * mean + (1 - decay) * weight."""
        for name, mean in self.means.items():
            mean.lerp_(_local(self._parameters[name]).float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's weights by their mean within the block."""
        weights = {name: _local(p).detach().clone() for name, p in self._parameters.items()}
        self._assign(self.means)
        try:
            yield
        finally:
            self._assign(weights)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            _local(parameter).copy_(values[name])
            if self.is_sharded:
                parameter.partition()  # drops the outdated gathered copy; the next forward gathers again


def _local(parameter: Any) -> Tensor:
    """Return what this process holds of a parameter: its flat shard, or all of it if it is not sharded."""
    local: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
    return local
