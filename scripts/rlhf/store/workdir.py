"""The work directory of an artefact: unfinished work, which one process at a time holds."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from rlhf.errors import UserError

_held: list[TextIO] = []  # files that stay open, and so locked, until this process ends


def hold(work: Path) -> None:
    """Lock a work directory until this process ends, so that no other process works on the artefact.

    Raises:
        UserError: another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = (work / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"{work} is in use by {file.read().strip() or 'another process'}, which makes the same"
            " artefact: wait for it, or end it and start again"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    _held.append(file)


def is_held(work: Path) -> bool:
    """Return whether a process holds the work directory now."""
    try:
        with (work / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
