"""Tokenised splits on disk: memory-mapped tokens, and an index of lengths.

A split is a directory with `tokens.bin`, int32, all rows one after another, and `index.npy`, int64
(N, 1 + parts): a row's offset, then the length of each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf.config.stages import Stage

Ids = NDArray[np.int32]  # token ids of one sequence

# The parts of a stage's rows.
PARTS: dict[Stage, tuple[str, ...]] = {
    "rlhf": ("prompt",),
    "sft": ("prompt", "response"),
    "reward": ("prompt", "chosen", "rejected"),
}


class RowWriter:
    """Writes a split row by row; the index is complete at the end of the `with` block."""

    def __init__(self, path: Path, parts: Sequence[str]) -> None:
        path.mkdir(parents=True)
        self.path, self.parts = path, tuple(parts)
        self._end = 0
        self._file = (path / "tokens.bin").open("wb")
        self._index = (path / "index.bin").open("w+b")

    def append(self, row: Sequence[Sequence[int]]) -> None:
        """Add a row: a sequence of token ids for each part."""
        lengths = [len(part) for part in row]
        np.concatenate([np.asarray(part, np.int32) for part in row]).tofile(self._file)
        np.array([self._end, *lengths], np.int64).tofile(self._index)
        self._end += sum(lengths)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._index.flush()
        raw, columns = self.path / "index.bin", len(self.parts) + 1
        # numpy cannot map an empty file.
        index = np.memmap(raw, np.int64, "r") if raw.stat().st_size else np.zeros(0, np.int64)
        np.save(self.path / "index.npy", index.reshape(-1, columns))  # (N, 1 + parts)
        self._index.close()
        raw.unlink()


class Rows:
    """A split that is read from disk on demand; `rows[i]` is a list with the token ids of each part."""

    def __init__(self, path: Path) -> None:
        index = np.load(path / "index.npy", mmap_mode="r")  # (N, 1 + parts)
        self._offsets, self._lengths = index[:, 0], index[:, 1:]
        size = (path / "tokens.bin").stat().st_size
        self._tokens: Ids = np.memmap(path / "tokens.bin", np.int32, "r") if size else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> list[Ids]:
        start, lengths = int(self._offsets[i]), self._lengths[i]
        ends = start + np.cumsum(lengths)  # (parts,)
        return [self._tokens[end - n : end] for n, end in zip(lengths, ends, strict=True)]

    def __iter__(self) -> Iterator[list[Ids]]:
        return (self[i] for i in range(len(self)))

    @property
    def tokens_per_part(self) -> NDArray[np.int64]:
        """(N, parts) int64: tokens of each part of each row."""
        return self._lengths

    @property
    def tokens_per_row(self) -> NDArray[np.int64]:
        """(N,) int64: tokens of each row, all parts together."""
        return np.asarray(self._lengths.sum(axis=1))
