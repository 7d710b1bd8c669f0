"""`rlhf.lock` on the volume: the commit that each revision meant when it was first downloaded.

A path such as `models/facebook/opt-1.3b@main` never changes its meaning: whoever removes it and
downloads it again gets the same commit.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError
from rlhf.store import write_json

FILE = Path("rlhf.lock")


def commit_of(artefact: Path) -> str | None:
    """Return the commit that was recorded for an artefact."""
    return _read().get(artefact.as_posix())


def record(artefact: Path, commit: str) -> None:
    """Record the commit of an artefact; one that is there stays."""
    with _alone():
        commits = _read()
        commits.setdefault(artefact.as_posix(), commit)
        draft = FILE.with_name(f".{FILE.name}.partial")
        write_json(draft, commits)
        os.rename(draft, FILE)


def _read() -> dict[str, str]:
    if not FILE.exists():
        return {}
    try:
        commits: dict[str, str] = dict(json.loads(FILE.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{FILE.resolve()} is damaged ({error}): mend it, or remove it; without it every revision means"
            " what it means now"
        ) from None
    return commits


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other downloads from writing at the same time."""
    place = Path("work/lock")
    place.parent.mkdir(exist_ok=True)
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
