"""Progress bars. `launch.py` thins them out in logs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item] | None,
    what: str,
    *,
    unit: str,
    start: int = 0,
    total: int | None = None,
    scale: bool = False,
) -> tqdm[Item]:
    """Return a bar over `items` (None: moved by hand), shown by rank 0 only.

    Args:
        scale: figures in k, M, G.
    """
    return tqdm(
        items, desc=what, unit=unit, initial=start, total=total, mininterval=1.0, unit_scale=scale,
        dynamic_ncols=True, disable=os.environ.get("RANK", "0") != "0",
    )  # fmt: skip
