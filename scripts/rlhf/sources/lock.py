"""`rlhf.lock` on the volume: the commit of each revision when it was first downloaded.

So a path such as `models/facebook/opt-1.3b@main` always means the same commit, also if the artefact is
removed and downloaded again.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError
from rlhf.files import atomic_write, write_json

FILE = Path("rlhf.lock")


def commit_of(artefact: Path) -> str | None:
    """Return the commit that is recorded for an artefact, or None.

    Raises:
        UserError: the file is damaged.
    """
    return _read().get(artefact.as_posix())


def record(artefact: Path, commit: str) -> None:
    """Record the commit of an artefact, unless one is recorded already.

    Raises:
        UserError: the file is damaged.
    """
    with _locked():
        commits = _read()
        commits.setdefault(artefact.as_posix(), commit)
        with atomic_write(FILE) as partial:
            write_json(partial, commits)


def _read() -> dict[str, str]:
    if not FILE.exists():
        return {}
    try:
        commits: dict[str, str] = dict(json.loads(FILE.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{FILE.resolve()} is damaged ({error}): repair it, or remove it; without it every revision means"
            " its newest commit"
        ) from None
    return commits


@contextmanager
def _locked() -> Iterator[None]:
    """Keep other downloads from writing the file within the block."""
    lock = Path("work/lock")
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
