"""Reading the rows of a dataset on the volume, one after another: the named columns, text as text.

Files are read by pyarrow and the standard library: they convert no value, need no cache, and know the line.
Only directories that `datasets` saved are read by `datasets`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from rlhf.config.sources import Dataset
from rlhf.data.discovery import files_of, format_of
from rlhf.errors import DataError, one_line
from rlhf.store.layout import FILES

BATCH = 1000  # rows
SHOWN = 60  # characters of an invalid line in a message
CHUNK = 1 << 20  # characters of a JSON list that are read at a time
BETWEEN = re.compile(r"[\s,]*")  # before and between the entries of a JSON list
DAMAGES = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)  # of compressed files and disks
Row = dict[str, Any]


class MissingColumns(Exception):
    """No row has some of the columns; `present` are those that rows have."""

    def __init__(self, present: list[str]) -> None:
        super().__init__(present)
        self.present = present


def read(artefact: Path, dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of a dataset's split with the columns that it names; None where a row lacks one.

    Args:
        artefact: the dataset's artefact.

    Raises:
        DataError: there is no such split, or a file cannot be read; the text names file and line.
        MissingColumns: the first thousand rows have no such column.
    """
    path = artefact / FILES
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _named(_saved(path, dataset), dataset)
        return
    for file in files_of(path, dataset):
        name = _as_written(file, path, dataset.name)
        if not os.path.getsize(file):
            raise DataError(f"{name} is empty: put rows into it, or remove it")
        yield from _named(READERS[format_of(file.name)](file, name, dataset), dataset)


def _named(rows: Iterator[Row], dataset: Dataset) -> Iterator[Row]:
    """Yield rows with the named columns alone."""
    first = list(islice(rows, BATCH))
    names = _found(list(dict.fromkeys(name for row in first for name in row)), dataset) if first else []
    for row in chain(first, rows):
        yield {name: row.get(name) for name in names}


def _found(present: list[str], dataset: Dataset) -> list[str]:
    """Return the named columns, if all of them are present."""
    if not set(dataset.columns.names) <= set(present):
        raise MissingColumns(present)
    return dataset.columns.names


def _as_written(file: Path, path: Path, name: str) -> str:
    """Return a file's name as the user knows it: the dataset's own name, or the path below it."""
    relative = os.path.relpath(file, path)
    return name if os.path.basename(name) == relative else f"{name.rstrip('/')}/{relative}"


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"cannot read {name}: {one_line(error)}")


# -- text ---------------------------------------------------------------------------------------------


def _opened(file: Path) -> BinaryIO:
    """Open a file, decompressed if its name says that it is compressed."""
    openers: dict[str, Any] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": lambda path, _: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
    }
    return cast("BinaryIO", openers.get(file.suffix.lower(), Path.open)(file, "rb"))


def _lines(file: Path, name: str, dataset: Dataset) -> Iterator[str]:
    """Yield the lines of a text file.

    Raises:
        DataError: a line is not in the dataset's encoding, or the file is damaged.
    """
    encoding = "utf-8-sig" if dataset.encoding == "utf-8" else dataset.encoding  # it may begin with a mark
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield line.decode(encoding if number == 1 else dataset.encoding)
                except UnicodeDecodeError:
                    raise DataError(
                        f"{name}, line {number}: not {dataset.encoding.upper()} ({_shown(line.decode(errors='replace'))}):"
                        " convert the file, or say what it is by `encoding` of the dataset, for example cp1252"
                    ) from None
    except DAMAGES as error:
        raise _unreadable(name, error) from error


def _shown(line: str) -> str:
    text = line.strip()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Invalid(Exception):
    """Text that is no row; says why."""


def _json_lines(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the objects of a file of JSON lines; blank lines are no rows."""
    lines = enumerate(_lines(file, name, dataset), 1)
    for number, line in lines:
        try:
            if line.strip():
                yield _row(line)
        except _Invalid as error:
            if number == 1 and file.name.endswith(".json"):
                raise DataError(
                    f"{name} is neither a list of objects nor one object in each line: correct it"
                ) from None
            count = 1 + sum(1 for _, other in lines if not _is_row(other))
            total = f" ({count} such lines)" if count > 1 else ""
            said = f"{error} ({_shown(line)}): correct or remove the line{total}"
            raise DataError(f"{name}, line {number}: {said}") from None


def _row(line: str) -> Row:
    """Return the object that a line of JSON holds.

    Raises:
        _Invalid: it holds none, or one that is ambiguous or no text.
    """
    try:
        return _checked(json.loads(line, object_pairs_hook=_unique), line)
    except (ValueError, RecursionError):
        raise _Invalid("not JSON") from None


def _is_row(line: str) -> bool:
    """Return whether a line holds an object, or nothing."""
    try:
        if line.strip():
            _row(line)
    except _Invalid:
        return False
    return True


def _checked(value: Any, text: str) -> Row:
    """Return what was read from JSON, if it is an object whose texts are text."""
    if not isinstance(value, dict):
        raise _Invalid("not a JSON object")
    if "\\ud" in text.lower() and _has_half_a_pair(value):
        raise _Invalid("half a surrogate pair, which is no character")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object, unless a key is in it twice."""
    if len(row := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Invalid(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return row


def _has_half_a_pair(row: Row) -> bool:
    """Return whether a text in it has a surrogate without its other half."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of lines."""
    try:
        with _opened(file) as content:
            begins = content.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    except DAMAGES as error:
        raise _unreadable(name, error) from error
    return (_json_list if begins == b"[" else _json_lines)(file, name, dataset)


def _json_list(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the objects of a JSON list, an entry at a time; a chunk of the text is held."""
    lines, decoder = _lines(file, name, dataset), json.JSONDecoder(object_pairs_hook=_unique)
    text, place, number, more = _some(lines).lstrip()[1:], 0, 0, True
    while True:
        place = BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
        if text.startswith("]", place):
            return
        try:
            value, end = decoder.raw_decode(text, place)
            row = _checked(value, text[place:end])
        except _Invalid as error:
            shown = _shown(" ".join(text[place : place + 2 * SHOWN].split()))
            raise DataError(f"{name}, entry {number + 1}: {error} ({shown}): correct or remove it") from None
        except (ValueError, RecursionError) as error:
            if not more:
                shown = _shown(text[place : place + 2 * SHOWN])
                raise DataError(f"{name}, entry {number + 1}: not JSON ({shown}): {error.args[0]}") from None
            added = _some(lines)
            text, place, more = text[place:] + added, 0, bool(added)
            continue
        number, place = number + 1, end
        yield row


def _some(lines: Iterator[str]) -> str:
    """Return some of the next lines; "" at the end."""
    text, length = [], 0
    for line in lines:
        text.append(line)
        length += len(line)
        if length > CHUNK:
            break
    return "".join(text)


def _csv(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of a table as text; its first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if format_of(file.name) == ".tsv" else ","
    table = csv.reader(_lines(file, name, dataset), delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}: its header names a column twice ({', '.join(header)}): correct it")
        for fields in table:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name}, line {table.line_num}: {len(fields)} fields, but the header has {len(header)}: correct"
                    " the line; a field with a comma or a line break needs quotes"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}, line {table.line_num}: {error}: correct the line") from error


# -- Arrow --------------------------------------------------------------------------------------------


def _parquet(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of a Parquet file; columns that nobody named are not read."""
    try:
        table = ParquetFile(file)
        for batch in table.iter_batches(BATCH, columns=_found(table.schema_arrow.names, dataset)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def _arrow(file: Path, name: str, dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of a stream in a file."""
    try:
        with pa.memory_map(str(file)) as source:
            try:
                batches: Any = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            for batch in batches:
                yield from batch.select(_found(batch.schema.names, dataset)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def _saved(path: Path, dataset: Dataset) -> Iterator[Row]:
    """Yield the rows of a directory that `datasets` saved: one dataset, or several by split."""
    import datasets  # noqa: PLC0415  # it takes a second, and looks for its cache

    try:
        found = datasets.load_from_disk(str(path))
        splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
        if dataset.split not in splits:
            raise DataError(f"{dataset.name} has no split {dataset.split!r}; there are {', '.join(splits)}")
        plain = splits[dataset.split].with_format(None)  # a saved format would convert, or hide columns
        for batch in plain.select_columns(_found(plain.column_names, dataset)).iter(batch_size=BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
        raise _unreadable(f"{dataset.name}, a directory that `datasets` saved", error) from error


READERS: dict[str, Callable[[Path, str, Dataset], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
}
