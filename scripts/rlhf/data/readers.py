"""Reading the rows of a dataset on the volume, one after another."""

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
from rlhf.store.layout import FILES

BATCH = 1000  # rows
Columns = dict[str, list[Any]]  # name -> values of several rows
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,
    datasets.exceptions.DatasetGenerationError,
)
JSON_LINES = (".jsonl", ".jsonl.gz", ".json")  # .json may also be one value on many lines
SHOWN = 60  # characters of an invalid line in a message

# Its messages count rows from 0 and name our copy. Ours give the line and the user's file.
logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)


def read(artefact: Path, split: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split, from Parquet, JSON, CSV or a directory that `datasets` saved.

    Args:
        artefact: the dataset's artefact.
        name: the dataset's name as the user wrote it, for messages.

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
    """Yield the rows of a directory that `datasets` saved: one dataset, or several by split."""
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.Dataset):
        dataset = _split_of(dataset, split, name)
    yield from dataset.iter(batch_size=BATCH)  # reading single rows is several times slower


def _split_of(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; there are {', '.join(map(str, splits))}")
    return splits[split]


def _published(path: Path, split: str, name: str) -> Iterator[Columns]:
    """Stream the files of a split: nothing is copied to a cache, and memory use is constant.

    `datasets` finds the files. Parquet is read here, because `datasets` would prefetch more of it the
    larger the files are.
    """
    files = _split_of(datasets.load_dataset_builder(str(path)).config.data_files, split, name)
    if empty := [file for file in files if not os.path.getsize(file)]:
        raise DataError(f"{_as_written(empty[0], path, name)} is empty: put rows into it, or remove it")
    if all(file.endswith(".parquet") for file in files):
        for file in files:
            for batch in ParquetFile(file).iter_batches(BATCH):
                yield batch.to_pydict()
        return
    try:
        yield from datasets.load_dataset(str(path), split=split, streaming=True).iter(batch_size=BATCH)
    except UNREADABLE:
        for file in files:
            _refuse_invalid_lines(file, _as_written(file, path, name))
        raise


def _as_written(file: str, path: Path, name: str) -> str:
    """Return a file's name as the user knows it: the dataset's own name, or the path below it."""
    relative = os.path.relpath(file, path)
    return name if os.path.basename(name) == relative else f"{name.rstrip('/')}/{relative}"


def _refuse_invalid_lines(file: str, name: str) -> None:
    """Read a file of JSON lines again, after a library failed to, and say which line is invalid."""
    if not file.endswith(JSON_LINES):
        return
    with gzip.open(file) if file.endswith(".gz") else Path(file).open("rb") as lines:
        checked = ((number, _fault(line), line) for number, line in enumerate(lines, 1))
        invalid = (entry for entry in checked if entry[1])
        number, fault, line = next(invalid, (0, "", b""))
        count = 1 + sum(1 for _ in invalid)
    if not number or (number == 1 and file.endswith(".json")):
        return
    text = line.decode(errors="replace").strip()
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    total = f" ({count} such lines)" if count > 1 else ""
    raise DataError(f"{name}, line {number}: {fault} ({shown}): correct or remove the line{total}")


def _fault(line: bytes) -> str | None:
    """Return why a line of JSON lines is not a row, or None if it is a row or blank."""
    try:
        text = line.decode()
        row = json.loads(text) if text.strip() else {}
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError:
        return "not JSON"
    return None if isinstance(row, dict) else "not a JSON object"
