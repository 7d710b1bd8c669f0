"""Reading the rows of a dataset that lies on the volume, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from rlhf.errors import DataError

BATCH = 1000  # rows
FILES = "files"  # where an artefact keeps the files as they were published


def read(artefact: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split: of Parquet, JSON, CSV or of what `datasets` saved to disk.

    Raises:
        DataError: there is no such split, or the files cannot be read.
    """
    path = artefact / FILES
    try:
        rows = _saved(path, split) if _is_saved(path) else _published(path, split)
        for batch in rows.iter(batch_size=BATCH):  # row by row costs several times as much
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError, KeyError) as error:
        raise DataError(f"cannot read split {split!r} of {artefact}: {error}") from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _saved(path: Path, split: str) -> datasets.Dataset:
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise DataError(f"{path} has no split {split!r}; there are {', '.join(found)}")
    return found[split]


def _published(path: Path, split: str) -> datasets.IterableDataset:
    """Return a stream over the files: nothing is copied to a cache, memory stays flat."""
    return datasets.load_dataset(str(path), split=split, streaming=True)
