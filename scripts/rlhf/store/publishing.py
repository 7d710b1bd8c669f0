"""Publishing artefacts: an artefact appears under its name complete, or not at all.

It contains `provenance.json`, the same for the same inputs, and `run.json` with time, machine and
duration, which is part of no hash.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import atomic_rename, write_json
from rlhf.store.provenance import PROVENANCE, RUN, file_hashes

LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "safetensors")


def link_or_copy(source: Path, target: Path) -> None:
    """Add a file to an artefact, as a hard link if the volume supports it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another volume, or one without hard links
        shutil.copy2(source, target)


def add_file(source: Path, target: Path, ours: bool) -> None:
    """Add a file to an artefact.

    A user's file, one that is not `ours`, is copied because it may be edited later. A read-only file
    is linked, which saves the space of a second copy of a large model.
    """
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if ours or not source.stat().st_mode & writable:
        return link_or_copy(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


@dataclass
class Draft:
    """An artefact that is being written; on success `path` is renamed to its final name."""

    path: Path
    provenance: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)


@contextmanager
def publish(path: Path, provenance: dict[str, Any]) -> Iterator[Draft]:
    """Yield a draft to write into; it becomes the artefact `path` if the block succeeds.

    Raises:
        UserError: `path` exists. Nothing is overwritten.
    """
    refuse_existing(path)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    draft = Draft(partial, dict(provenance))
    yield draft
    write_json(partial / RUN, draft.run)
    _make_readable(partial)
    draft.provenance.setdefault("versions", _versions())  # an adopted artefact keeps its own
    draft.provenance["files"] = file_hashes(partial)
    write_json(partial / PROVENANCE, draft.provenance)
    atomic_rename(partial, path)


def refuse_existing(path: Path) -> None:
    """Raise UserError if the artefact exists already."""
    if path.exists():
        raise UserError(f"{path} exists already; nothing was overwritten. Remove it to build it again.")


def _make_readable(path: Path) -> None:
    """Set the usual permissions: safetensors lets only the owner read its files, and others use them."""
    os.umask(umask := os.umask(0))
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:  # a hard link shares permissions with its source
            file.chmod(0o666 & ~umask)


def _versions() -> dict[str, str]:
    """Return the versions of the installed libraries that decide results."""
    installed = {d.name.lower() for d in importlib.metadata.distributions() if d.name}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed}
