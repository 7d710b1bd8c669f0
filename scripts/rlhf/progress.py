"""Progress bars. `launch.py` writes few of their updates to logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from rlhf.machine import is_rank_zero

Item = TypeVar("Item")
BARS: WeakSet[tqdm[Any]] = WeakSet()


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
    bar = tqdm(
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
    BARS.add(bar)
    return bar


def close_bars() -> None:
    """End the lines of bars that an error has left open: a message on their line would not be found."""
    for bar in list(BARS):
        bar.close()
