"""Tokenised splits on disk: memory-mapped tokens, an index of lengths, a card of counts.

A split is a directory: `tokens.bin` (int32, all rows one after another), `index.npy` (int64, one
line per row: offset, then the length of each part) and, for all splits of an artefact together,
`card.json`. Parts: a prompt; prompt and response; prompt, chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

PARTS = {
    "rlhf": ("prompt",),
    "sft": ("prompt", "response"),
    "reward": ("prompt", "chosen", "rejected"),
}


class RowWriter:
    """Appends rows to a split; the index is written on leaving the `with` block."""

    def __init__(self, path: Path, parts: Sequence[str]) -> None:
        path.mkdir(parents=True)
        self.path, self.parts = path, tuple(parts)
        self._end = 0
        self._file = (path / "tokens.bin").open("wb")
        self._index = (path / "index.bin").open("w+b")

    def append(self, row: Sequence[Sequence[int]]) -> None:
        """Add a row: one sequence of token ids per part."""
        lengths = [len(part) for part in row]
        np.concatenate([np.asarray(part, np.int32) for part in row]).tofile(self._file)
        np.array([self._end, *lengths], np.int64).tofile(self._index)
        self._end += sum(lengths)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._index.flush()
        raw, columns = self.path / "index.bin", len(self.parts) + 1
        index = np.memmap(raw, np.int64, "r") if raw.stat().st_size else np.zeros(0, np.int64)
        np.save(self.path / "index.npy", index.reshape(-1, columns))
        self._index.close()
        raw.unlink()


class Rows(Sequence[list[Ids]]):
    """A split, read from disk as it is needed; `rows[i]` is a list of token ids, part by part."""

    def __init__(self, path: Path) -> None:
        index = np.load(path / "index.npy", mmap_mode="r")
        self._offsets, self._lengths = index[:, 0], index[:, 1:]
        size = (path / "tokens.bin").stat().st_size
        self._tokens: Ids = np.memmap(path / "tokens.bin", np.int32, "r") if size else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> list[Ids]:  # type: ignore[override]
        start, lengths = int(self._offsets[i]), self._lengths[i]
        ends = start + np.cumsum(lengths)
        return [self._tokens[end - n : end] for n, end in zip(lengths, ends, strict=True)]

    @property
    def tokens_per_part(self) -> NDArray[np.int64]:
        """(N, parts) tokens of each part of each row."""
        return self._lengths

    @property
    def tokens_per_row(self) -> NDArray[np.int64]:
        """(N,) tokens of each row, all parts."""
        return np.asarray(self._lengths.sum(axis=1))
