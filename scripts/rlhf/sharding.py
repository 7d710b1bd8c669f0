"""Models whose parameters ZeRO-3 has spread over processes: gathered copies, saving by shards.

A model that is not spread out goes through the same functions; nothing is gathered then. All
processes call them together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf import lora, parallel, tensor_parallel
from rlhf.parallel import Group

SHARD_BYTES = 2 * 10**9  # as much is gathered at a time when a sharded model is saved


def is_sharded(model: nn.Module) -> bool:
    """Return whether ZeRO-3 holds the model's parameters."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def whole(parameters: Sequence[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Have whole parameters within this; with `changed` all processes keep what rank 0 made of them."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    # Imported here: DeepSpeed takes seconds to import, and chat does not need it.
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415

    with GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


def generator(model: Any, group: Group) -> Any:
    """Return a model that can generate without other processes than the group's.

    It is the model itself, or a copy: gathered, of which each process of the group has its part. The
    copy is filled parameter by parameter, so that at most one is there whole; it goes when the caller
    lets it go.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
        if group.size > 1:
            tensor_parallel.cut(made, group)
    made = made.to(dtype=model.dtype).to_empty(device=parallel.device())
    made.tie_weights()
    with torch.no_grad():
        for name, target in made.named_parameters():
            with whole(lora.parts(model, name)):
                target.copy_(tensor_parallel.part(lora.published(model, name), target.shape, group))
        for ours, theirs in zip(made.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return made.eval()


def write_shards(model: Any, path: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a sharded model's weights as safetensors, as `save_pretrained` would, a file at a time.

    Rank 0 writes; no process ever holds more than `shard_bytes` of gathered weights, or the largest
    tensor.
    """
    shapes = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
        for name, p in model.named_parameters()
        if not lora.is_adapter(name)
    }
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in plan.filename_to_tensors.items():
        with whole([part for name in names for part in lora.parts(model, name)]), torch.no_grad():
            if parallel.rank() == 0:
                tensors = {name: lora.published(model, name).cpu().contiguous() for name in names}
                save_file(tensors, path / file, {"format": "pt"})
    if plan.is_sharded and parallel.rank() == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
