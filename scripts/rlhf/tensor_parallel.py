"""A model cut by heads and channels, which a group of processes computes with together.

Linear layers that read the hidden state are cut by outputs: each process has some heads of the
attention and some channels of the MLP. Those that add to it are cut by inputs, and the processes add up
what comes out. All else is whole everywhere. Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf import families, parallel
from rlhf.batch import exact_div
from rlhf.parallel import Group


class Summing(nn.Linear):
    """A linear layer of which each process of a group has some inputs; all get the whole output."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: Group) -> None:
        super().__init__(inputs, outputs, bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        out = parallel.summed(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias  # after the sum: once


def cut(model: Any, group: Group) -> None:
    """Replace the linear layers of a model that has no values yet by this process's parts of them.

    Raises:
        UserError: the model cannot be cut into so many equal parts.
    """
    families.refuse_uneven(model.config, group.size)
    family = model.config.model_type
    count = families.HEAD_COUNT.get(family)
    for path, module in list(model.named_modules()):
        where, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in families.LINEAR[family]:
            setattr(
                model.get_submodule(where), name, _part_of(module, name in families.WRITERS[family], group)
            )
        elif count and hasattr(module, count):
            setattr(module, count, exact_div(getattr(module, count), group.size, "heads"))


def _part_of(layer: nn.Linear, writes: bool, group: Group) -> nn.Linear:
    inputs, outputs, bias = layer.in_features, layer.out_features, layer.bias is not None
    if writes:
        return Summing(exact_div(inputs, group.size, "inputs"), outputs, bias, group)
    return nn.Linear(inputs, exact_div(outputs, group.size, "outputs"), bias)


def part(weights: Tensor, shape: torch.Size, group: Group) -> Tensor:
    """Return this process's part of whole weights, which has `shape`: all of what is not cut."""
    for dimension, size in enumerate(shape):
        if size != weights.shape[dimension]:
            return weights.narrow(dimension, group.place * size, size)
    return weights
