"""Writing files so that they appear whole or not at all, also after a power failure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_json(path: Path, value: object) -> None:
    """Write JSON the same way everywhere: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def walk(root: Path) -> list[Path]:
    """Return the files of a directory and below it, sorted; links are followed, in circles once."""
    found, seen = list[Path](), set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(path for path in found if path.is_file())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` if the block succeeds."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    atomic_rename(partial, path)


def atomic_rename(partial: Path, final: Path) -> None:
    """Give a file or directory its final name once its content is on disk."""
    sync(partial)
    os.rename(partial, final)
    _sync_one(final.parent)


def sync(path: Path) -> None:
    """Flush a file, or a whole directory, to disk, so that a rename never outlives its content."""
    for entry in [*path.rglob("*"), path]:
        _sync_one(entry)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
