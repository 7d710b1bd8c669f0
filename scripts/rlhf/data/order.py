"""The order of rows in a training: a function of seed and step, without a state to save.

Rows form an endless stream, one shuffled pass after another, so that no batch is short and no row
is left out. Within a window of several batches, rows are sorted by length and the batches shuffled.
So a batch has rows of similar length, and little padding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rlhf.data.streams import Purpose, rng

Indices = NDArray[np.int64]

WINDOW = 32  # batches: enough rows of similar length for little padding, few enough to stay a shuffle


@lru_cache(maxsize=2)
def _pass(rows: int, seed: int, epoch: int) -> Indices:
    return rng(seed, Purpose.PASS, epoch).permutation(rows)


def stream(rows: int, seed: int, start: int, count: int) -> Indices:
    """Return (count,) int64: the rows at positions `start` to `start + count` of the stream."""
    positions = np.arange(start, start + count)
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    pieces = [_pass(rows, seed, e)[positions[positions // rows == e] % rows] for e in epochs]
    return np.concatenate(pieces)  # (count,)


def batch(
    lengths: NDArray[np.int64], size: int, step: int, steps: int, seed: int, window: int = WINDOW
) -> Indices:
    """Return (size,) int64: the rows of one batch, sorted by length.

    All batches together are the first `steps` * `size` rows of the stream: each row is in a pass once.
    It has six parameters because all of them decide the order: the data's lengths, the training's size,
    steps and seed, which batch, and the window.

    Args:
        lengths: (N,) tokens of every row.
        size: rows of a batch.
        step: number of the batch, from 0.
        steps: batches of the training.
        window: batches, at most, within which rows are sorted by length; 1 sorts within each batch only.
    """
    # Never longer than a pass: else copies of a row would be sorted next to each other.
    window = min(window, max(1, len(lengths) // size))
    number = step // window  # of the window
    batches = min(window, steps - number * window)
    rows = stream(len(lengths), seed, number * window * size, batches * size)
    rows = rows[np.argsort(lengths[rows], kind="stable")]  # (batches * size,)
    batch_in_window = rng(seed, Purpose.WINDOW, number).permutation(batches)[step % window]
    return rows[batch_in_window * size : (batch_in_window + 1) * size]
