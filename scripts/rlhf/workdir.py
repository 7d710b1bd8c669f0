"""The directory of unfinished work on one artefact: held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from rlhf.errors import UserError

_held: list[TextIO] = []  # open until this process ends, and the locks with them


def hold(work: Path) -> None:
    """Keep others from working on the same artefact; the lock goes with this process.

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
            f"{work} is in use by {file.read().strip() or 'another process'}: that one makes the same"
            " artefact. Wait for it, or end it and start again."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    _held.append(file)


def is_held(work: Path) -> bool:
    """Return whether a process works on the artefact at this moment."""
    try:
        with (work / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
