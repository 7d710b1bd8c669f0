"""Reading the rows of a dataset that lies on the volume, one after another."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from pyarrow.parquet import ParquetFile

from rlhf.errors import DataError, one_line

BATCH = 1000  # rows
Columns = dict[str, list[Any]]  # name -> values of some rows
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,
    datasets.exceptions.DatasetGenerationError,
)
FILES = "files"  # where an artefact keeps the files as they were published
JSON_LINES = (".jsonl", ".jsonl.gz", ".json")  # the last may also be one value over many lines
SHOWN = 60  # characters of a broken line

# It counts rows from 0 in the name of our copy: we say which line of which dataset it is.
logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)


def read(artefact: Path, split: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split: of Parquet, JSON, CSV or of what `datasets` saved to disk.

    Args:
        name: the dataset's, as the user wrote it, for messages.

    Raises:
        DataError: there is no such split, or the files cannot be read.
    """
    path = artefact / FILES
    try:
        for batch in _saved(path, split, name) if _is_saved(path) else _published(path, split, name):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except UNREADABLE as error:
        raise DataError(f"cannot read split {split!r} of {name}: {one_line(error)}") from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _saved(path: Path, split: str, name: str) -> Iterator[Columns]:
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.Dataset):
        found = _one(found, split, name)
    yield from found.iter(batch_size=BATCH)  # row by row costs several times as much


def _one(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; there are {', '.join(map(str, splits))}")
    return splits[split]


def _published(path: Path, split: str, name: str) -> Iterator[Columns]:
    """Stream over the files of a split: nothing is copied to a cache, memory stays flat.

    `datasets` finds them. It reads Parquet ahead, by more the larger the files are: that is done here.
    """
    files = _one(datasets.load_dataset_builder(str(path)).config.data_files, split, name)
    if empty := [file for file in files if not os.path.getsize(file)]:
        raise DataError(f"{_as_written(empty[0], path, name)} is empty: put rows into it, or take it out")
    if all(file.endswith(".parquet") for file in files):
        for file in files:
            for batch in ParquetFile(file).iter_batches(BATCH):
                yield batch.to_pydict()
        return
    try:
        yield from datasets.load_dataset(str(path), split=split, streaming=True).iter(batch_size=BATCH)
    except UNREADABLE:
        for file in files:
            _refuse_broken_lines(file, _as_written(file, path, name))
        raise


def _as_written(file: str, path: Path, name: str) -> str:
    """Return a file's name as the user knows it: the dataset's own, or where it lies in the dataset."""
    inner = os.path.relpath(file, path)
    return name if os.path.basename(name) == inner else f"{name.rstrip('/')}/{inner}"


def _refuse_broken_lines(file: str, told: str) -> None:
    """Read a file of JSON lines again, after a library gave up on it, and say which line is broken."""
    if not file.endswith(JSON_LINES):
        return
    with gzip.open(file) if file.endswith(".gz") else Path(file).open("rb") as lines:
        judged = ((number, _fault(line), line) for number, line in enumerate(lines, 1))
        faults = (one for one in judged if one[1])
        number, fault, line = next(faults, (0, "", b""))
        count = 1 + sum(1 for _ in faults)
    if not number or (number == 1 and file.endswith(".json")):
        return
    text = line.decode(errors="replace").strip()
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    many = f" ({count} such lines)" if count > 1 else ""
    raise DataError(f"{told}, line {number}: {fault} ({shown}): correct or remove the line{many}")


def _fault(line: bytes) -> str | None:
    """Return why a line of JSON lines is no row, or None if it is one or blank."""
    try:
        text = line.decode()
        row = json.loads(text) if text.strip() else {}
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError:
        return "not JSON"
    return None if isinstance(row, dict) else "not a JSON object"
