"""Progress bars. `launch.py` thins them out in logs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], what: str, *, unit: str, start: int = 0, total: int | None = None
) -> tqdm[Item]:
    """Return a bar over `items`, shown by rank 0 only."""
    return tqdm(
        items, desc=what, unit=unit, initial=start, total=total, mininterval=1.0,
        dynamic_ncols=True, disable=os.environ.get("RANK", "0") != "0",
    )  # fmt: skip
