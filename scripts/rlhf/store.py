"""Artefacts: how they are named, published whole, and checked.

An artefact is a directory named by a hash of what went into it. It appears under its name complete
or not at all, and carries `provenance.json` (the same for the same inputs) and `run.json` (when,
where, how long), which takes part in no hash.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, UserError, one_line

PROVENANCE, RUN = "provenance.json", "run.json"
STAMP = ".snakemake_timestamp"  # Snakemake writes it into directories that are outputs
LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "safetensors")


def key(stage: str, config: object, parents: dict[str, str], code: str) -> str:
    """Return the hash (12 hex) that names an artefact.

    Args:
        stage: what kind of artefact.
        config: what changes its content, as JSON values.
        parents: role -> path of the artefacts it is made from.
        code: digest of the code that makes it.
    """
    text = json.dumps([stage, config, parents, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(path: Path) -> str:
    """Return what stands for the content of a file or directory, without reading it (12 hex).

    Names, sizes and times of change of every file: whoever edits one gets another artefact. The
    same for every path that does not exist.
    """
    files = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    seen = [(p.relative_to(path.parent).parts[1:], *_size_and_time(p)) for p in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into an artefact, on the same disk blocks where the volume can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another volume, or one without hard links
        shutil.copy2(source, target)


def take(source: Path, target: Path, ours: bool) -> None:
    """Put a file into an artefact: a user's (not `ours`) is copied: it may be edited later.

    What nobody may write to is not copied, which for large models saves the space of a second one.
    """
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if ours or not source.stat().st_mode & writable:
        return link_or_copy(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


@dataclass
class Draft:
    """An artefact that is being written; `path` becomes its final place on success."""

    path: Path
    provenance: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)


@contextmanager
def publish(path: Path, provenance: dict[str, Any]) -> Iterator[Draft]:
    """Give a directory to write into that becomes `path` if the block succeeds.

    Raises:
        UserError: `path` exists. Nothing is overwritten.
    """
    refuse_existing(path)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir(parents=True)
    draft = Draft(partial, dict(provenance))
    yield draft
    write_json(partial / RUN, draft.run)
    _make_readable(partial)
    draft.provenance.setdefault("versions", _versions())  # an adopted one brings its own
    draft.provenance["files"] = file_hashes(partial)
    write_json(partial / PROVENANCE, draft.provenance)
    sync(partial)
    os.rename(partial, path)
    _sync_one(path.parent)


def work_of(artefact: Path) -> Path:
    """Return where unfinished work on an artefact lies, both relative to the volume."""
    return Path("work", artefact.as_posix().removeprefix("store/"))


def refuse_existing(path: Path) -> None:
    """Raise UserError if an artefact is there already."""
    if path.exists():
        raise UserError(f"{path} exists already; nothing was overwritten. Remove it to make it anew.")


def _make_readable(path: Path) -> None:
    """Give files the usual rights: safetensors writes them for their owner alone, and others use them."""
    os.umask(umask := os.umask(0))
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:  # a link's rights are its source's too
            file.chmod(0o666 & ~umask)


def write_json(path: Path, value: object) -> None:
    """Write JSON the same way everywhere: sorted keys, two spaces, a final newline."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_provenance(path: Path) -> dict[str, Any]:
    """Return an artefact's provenance.

    Raises:
        DataError: it has none, so that it is no artefact or not a whole one; or its provenance is damaged.
    """
    try:
        record = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} has no {PROVENANCE}: not an artefact, or not a whole one") from None
    except ValueError as error:
        raise DataError(f"{path / PROVENANCE} is damaged: {one_line(error)}") from None
    if not (isinstance(record, dict) and isinstance(record.get("files"), dict)):
        raise DataError(f"{path / PROVENANCE} is damaged: it does not list the artefact's files")
    return record


def refuse_not_whole(paths: Iterable[Path]) -> None:
    """Refuse directories in an artefact's place that are none: Snakemake asks only whether they exist.

    Raises:
        DataError: with all of them.
    """
    if broken := [str(path) for path in paths if path.is_dir() and not (path / PROVENANCE).exists()]:
        raise DataError(
            f"no {PROVENANCE} in {', '.join(broken)}: not a whole artefact, perhaps a copy or a removal that was"
            " interrupted. Move it away or remove it, and it is made again"
        )


def file_hashes(path: Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file but provenance, run record and stamp."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return {n: sha256(path / n) for n in names if n not in (PROVENANCE, RUN, STAMP)}


def sha256(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path) -> list[str]:
    """Compare an artefact's files with its provenance; return what differs, in words."""
    recorded, found = read_provenance(path)["files"], file_hashes(path)
    missing = [f"{name} is missing" for name in recorded.keys() - found.keys()]
    changed = [f"{n} has changed" for n in recorded.keys() & found.keys() if recorded[n] != found[n]]
    return sorted(missing + changed + [f"{n} is not part of it" for n in found.keys() - recorded.keys()])


def parent_of(path: Path) -> Path:
    """Return the artefact that `path` lies in: the nearest directory with a provenance.

    Raises:
        DataError: there is none.
    """
    real = path.resolve()
    for candidate in (real, *real.parents):
        if (candidate / PROVENANCE).exists():
            return candidate
    raise DataError(f"{path} does not lie in an artefact (no {PROVENANCE} above it)")


def _versions() -> dict[str, str]:
    found = {d.name.lower() for d in importlib.metadata.distributions() if d.name}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in found}


def sync(path: Path) -> None:
    """Flush a whole directory to disk, so that a rename never outlives its content."""
    for entry in [*path.rglob("*"), path]:
        _sync_one(entry)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
