"""The order in which rows are seen: a function of seed and step, with nothing to remember.

Rows form an endless stream, one shuffled pass after another, so that no batch is short and no row
is left out. Within a window of some batches rows are sorted by length and the batches shuffled, so
that a batch holds rows of like length and little padding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rlhf.streams import Purpose, rng

Indices = NDArray[np.int64]

WINDOW = 32  # batches: enough rows of like length for little padding, few enough to stay a shuffle


@lru_cache(maxsize=2)
def _pass(rows: int, seed: int, epoch: int) -> Indices:
    return rng(seed, Purpose.PASS, epoch).permutation(rows)


def stream(rows: int, seed: int, start: int, count: int) -> Indices:
    """Return which rows stand at `count` places of the stream from `start` on."""
    places = np.arange(start, start + count)
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    parts = [_pass(rows, seed, e)[places[places // rows == e] % rows] for e in epochs]
    return np.concatenate(parts)


def batch(
    lengths: NDArray[np.int64], size: int, step: int, steps: int, seed: int, window: int = WINDOW
) -> Indices:
    """Return the rows of one batch, sorted by length.

    All batches together hold the first `steps` * `size` rows of the stream: a pass sees each row once.

    Args:
        lengths: (N,) tokens of every row.
        size: rows of a batch.
        step: which batch, from 0.
        steps: batches of the whole training.
        window: batches within which rows are grouped by length, at most; 1 leaves them as they come. No more
            than a pass has, lest copies of a row lie side by side.
    """
    window = min(window, max(1, len(lengths) // size))
    which = step // window
    batches = min(window, steps - which * window)
    rows = stream(len(lengths), seed, which * window * size, batches * size)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    turn = rng(seed, Purpose.WINDOW, which).permutation(batches)[step % window]
    return rows[turn * size : (turn + 1) * size]
