"""What a working directory's gangs have on its volume: their common name, and where each was made.

Options change from one start of Snakemake to the next; a gang that runs must be found all the same, or a
second one would write beside it.
"""

from __future__ import annotations

import os
from pathlib import Path


def identity(state: Path, proposal: str) -> str:
    """Return the name of the directory whose gangs' state is `state`: what its first run proposed.

    The proposal is made of options, among others. It is no random name, so that a directory whose
    `.snakemake` somebody has deleted finds its gangs with the same options.
    """
    path = state / "place"
    if not path.exists():
        write_whole(path, proposal + "\n")
    return path.read_text().strip()


def note(state_dir: str, kind: str, namespace: str) -> None:
    """Write down as what a gang is about to be made, and where."""
    write_whole(Path(state_dir, "made-as"), f"{kind} {namespace}\n")


def last(state_dir: str) -> tuple[str, str]:
    """Return as what kind and in which namespace a gang was last made; empty if it never was."""
    path = Path(state_dir, "made-as")
    kind, _, namespace = path.read_text().strip().partition(" ") if path.exists() else ("", "", "")
    return kind, namespace


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole, also for pods that look at that moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
