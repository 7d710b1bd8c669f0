"""Reading the rows of a dataset that lies on the volume, one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from pyarrow.parquet import ParquetFile

from rlhf.errors import DataError

BATCH = 1000  # rows
Columns = dict[str, list[Any]]  # name -> values of some rows
UNREADABLE = (
    ValueError,
    OSError,
    KeyError,
    TypeError,
    RuntimeError,
    datasets.exceptions.DatasetGenerationError,
)
FILES = "files"  # where an artefact keeps the files as they were published


def read(artefact: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split: of Parquet, JSON, CSV or of what `datasets` saved to disk.

    Raises:
        DataError: there is no such split, or the files cannot be read.
    """
    path = artefact / FILES
    try:
        for batch in _saved(path, split) if _is_saved(path) else _published(path, split):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except UNREADABLE as error:
        raise DataError(f"cannot read split {split!r} of {artefact}: {error}") from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _saved(path: Path, split: str) -> Iterator[Columns]:
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.Dataset):
        found = _one(found, split, path)
    yield from found.iter(batch_size=BATCH)  # row by row costs several times as much


def _one(splits: Mapping[str, Any], split: str, path: Path) -> Any:
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; there are {', '.join(map(str, splits))}")
    return splits[split]


def _published(path: Path, split: str) -> Iterator[Columns]:
    """Stream over the files of a split: nothing is copied to a cache, memory stays flat.

    `datasets` finds them. It reads Parquet ahead, by more the larger the files are: that is done here.
    """
    files = _one(datasets.load_dataset_builder(str(path)).config.data_files, split, path)
    if empty := [name for name in files if not os.path.getsize(name)]:
        raise DataError(f"{empty[0]} is empty")
    if all(name.endswith(".parquet") for name in files):
        for name in files:
            for batch in ParquetFile(name).iter_batches(BATCH):
                yield batch.to_pydict()
    else:
        yield from datasets.load_dataset(str(path), split=split, streaming=True).iter(batch_size=BATCH)
