"""Progress bars. `launch.py` writes few of their updates to logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from rlhf.machine import is_rank_zero

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
    """Return a bar over `items` (None: updated by hand), shown by rank 0 only.

    It has six parameters because tqdm has: `start` and `total` are in units, `scale` shows k, M, G.
    """
    return tqdm(
        items,
        desc=what,
        unit=unit,
        initial=start,
        total=total,
        mininterval=1.0,
        unit_scale=scale,
        dynamic_ncols=True,
        disable=not is_rank_zero(),
    )
