"""Models whose parameters ZeRO-3 shards over processes: gathering and saving them.

All processes call these functions together. They work for models that are not sharded too; then
nothing is gathered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf import parallel
from rlhf.models import lora

SHARD_BYTES = 2 * 10**9  # the largest file of a sharded model; the weights of one file are gathered at a time


def is_sharded(model: nn.Module) -> bool:
    """Return whether ZeRO-3 shards the model's parameters."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def gathered_parameters(parameters: Sequence[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Gather parameters, of any dtype, to their full shapes within the block.

    Args:
        changed: rank 0 changes the parameters in the block; all processes keep its values.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    # Imported here because it takes seconds, and chat does not need DeepSpeed.
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415

    with GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


def write_shards(model: Any, path: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a sharded model's weights as safetensors, as `save_pretrained` would, file by file.

    Rank 0 writes. A process holds at most `shard_bytes` of gathered weights, or one tensor that is
    larger, plus the adapters of these weights.
    """
    # Tensors without memory: their shapes and dtypes decide which file a weight belongs to.
    shapes = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
        for name, p in model.named_parameters()
        if not lora.is_adapter(name)
    }
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in plan.filename_to_tensors.items():
        sources = {name: lora.source(model, name) for name in names}
        with gathered_parameters([p for s in sources.values() for p in s.parameters]), torch.no_grad():
            if parallel.rank() == 0:
                tensors = {name: s.merged().cpu().contiguous() for name, s in sources.items()}
                save_file(tensors, path / file, {"format": "pt"})
    if plan.is_sharded and parallel.rank() == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
