"""The model that samples: the trained one itself, or a gathered copy of one that ZeRO-3 shards."""

from __future__ import annotations

import copy
from typing import Any

import torch

from rlhf import parallel
from rlhf.generation import tensor_parallel
from rlhf.models import lora
from rlhf.models.sharding import gathered_parameters, is_sharded
from rlhf.parallel import Group


def sampling_copy(model: Any, group: Group) -> Any:
    """Return a model that can generate without other processes than the group's.

    It is the model itself, or a copy, of which each process of the group has its part. The copy is
    filled parameter by parameter, so that at most one is gathered at a time. It is freed when the
    caller drops it.

    Raises:
        UserError: the group cannot have equal parts of the model.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        target = type(model)(copy.deepcopy(model.config))
        if group.size > 1:
            tensor_parallel.split_linears(target, group)
    target = target.to(dtype=model.dtype).to_empty(device=parallel.device())
    target.tie_weights()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            with gathered_parameters(lora.parameters_of(model, name)):
                whole = lora.merged_weight(model, name)
                parameter.copy_(tensor_parallel.own_shard(whole, parameter.shape, group))
        for ours, theirs in zip(target.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return target.eval()
