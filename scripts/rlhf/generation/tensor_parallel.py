"""A model split by heads and channels, with which a group of processes computes together.

Linear layers that read the hidden state are split by outputs: each process has some heads of the
attention and some channels of the MLP. Layers that add to the hidden state are split by inputs, and
the processes sum their outputs. Everything else is whole in every process.

Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf import parallel
from rlhf.config.batch import exact_div
from rlhf.models import families
from rlhf.parallel import Group


class SummedLinear(nn.Linear):
    """A linear layer of which each process of a group has some inputs; all get the whole output."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: Group) -> None:
        super().__init__(inputs, outputs, bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, outputs) from this process's inputs (B, T, inputs / group size)."""
        out = parallel.group_sum(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias  # after the sum: once


def split_linears(model: Any, group: Group) -> None:
    """Replace the linear layers of a model on the meta device by this process's shards of them.

    Raises:
        UserError: the model cannot be split into so many equal shards.
    """
    families.refuse_uneven(model.config, group.size)
    family = model.config.model_type
    count = families.HEAD_COUNT.get(family)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in families.LINEAR[family]:
            shard = _shard_of(module, name in families.WRITERS[family], group)
            setattr(model.get_submodule(parent), name, shard)
        elif count and hasattr(module, count):
            setattr(module, count, exact_div(getattr(module, count), group.size, "heads"))


def _shard_of(layer: nn.Linear, writes: bool, group: Group) -> nn.Linear:
    inputs, outputs, bias = layer.in_features, layer.out_features, layer.bias is not None
    if writes:
        return SummedLinear(exact_div(inputs, group.size, "inputs"), outputs, bias, group)
    return nn.Linear(inputs, exact_div(outputs, group.size, "outputs"), bias)


def own_shard(weights: Tensor, shape: torch.Size, group: Group) -> Tensor:
    """Return this process's shard, of `shape`, of whole weights; all of weights that are not split."""
    for dimension, size in enumerate(shape):
        if size != weights.shape[dimension]:
            return weights.narrow(dimension, group.position * size, size)
    return weights
