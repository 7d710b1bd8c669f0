"""An artefact's record of itself: `provenance.json`, with its inputs and a hash of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, one_line

PROVENANCE, RUN = "provenance.json", "run.json"
STAMP = ".snakemake_timestamp"  # Snakemake writes it into directories that are outputs


def read(path: Path) -> dict[str, Any]:
    """Return an artefact's provenance.

    Raises:
        DataError: there is no provenance, or it is damaged.
    """
    try:
        record = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} has no {PROVENANCE}: not an artefact, or an incomplete one") from None
    except ValueError as error:
        raise DataError(f"{path / PROVENANCE} is damaged: {one_line(error)}") from None
    if not (isinstance(record, dict) and isinstance(record.get("files"), dict)):
        raise DataError(f"{path / PROVENANCE} is damaged: it does not list the artefact's files")
    return record


def refuse_incomplete(paths: Iterable[Path]) -> None:
    """Refuse artefacts without a provenance: Snakemake checks only that their directories exist.

    Raises:
        DataError: some exist without it; the text names all of them.
    """
    if incomplete := [str(path) for path in paths if path.is_dir() and not (path / PROVENANCE).exists()]:
        raise DataError(
            f"no {PROVENANCE} in {', '.join(incomplete)}: an incomplete artefact, perhaps after an interrupted"
            " copy or removal. Move it away or remove it; then it is built again"
        )


def file_hashes(path: Path) -> dict[str, str]:
    """Return relative name -> sha256 of every file except provenance, run record and stamp."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return {n: sha256(path / n) for n in names if n not in (PROVENANCE, RUN, STAMP)}


def sha256(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(path: Path) -> list[str]:
    """Return how an artefact's files differ from its provenance, one sentence per file.

    Raises:
        DataError: as `read`.
    """
    recorded, present = read(path)["files"], file_hashes(path)
    missing = [f"{name} is missing" for name in recorded.keys() - present.keys()]
    changed = [f"{n} has changed" for n in recorded.keys() & present.keys() if recorded[n] != present[n]]
    return sorted(missing + changed + [f"{n} is not part of it" for n in present.keys() - recorded.keys()])


def parent_of(path: Path) -> Path:
    """Return the artefact that contains `path`: the nearest directory with a provenance.

    Raises:
        DataError: no directory above it has one.
    """
    real = path.resolve()
    for candidate in (real, *real.parents):
        if (candidate / PROVENANCE).exists():
            return candidate
    raise DataError(f"{path} is not inside an artefact (no {PROVENANCE} above it)")
