"""What the machine at hand has."""

from __future__ import annotations

import os
from itertools import takewhile
from pathlib import Path

INVALID = ("", "-1", "NoDevFiles")  # CUDA sees no device from the first such name on


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs, as CUDA_VISIBLE_DEVICES wants them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = (name.strip() for name in visible.split(","))
        return list(takewhile(lambda name: name not in INVALID, names))
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
