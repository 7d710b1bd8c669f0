"""The machine at hand, and this process's rank."""

from __future__ import annotations

import os
from itertools import takewhile
from pathlib import Path

INVALID = ("", "-1", "NoDevFiles")  # CUDA ignores this name and all after it


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs, as CUDA_VISIBLE_DEVICES wants them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = (name.strip() for name in visible.split(","))
        return list(takewhile(lambda name: name not in INVALID, names))
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def is_rank_zero() -> bool:
    """Return whether this is the first process of a training, or the only one; needs no torch."""
    return os.environ.get("RANK", "0") == "0"
