"""Files on the volume: the working directory's identity, how each gang was created, and what pods read.

Options change from one run of Snakemake to the next. A running gang must still be found, or a second
one would write to the same files.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import manifest
from .spec import GangSpec

IDENTITY_FILE = "place"


def stored_identity(directory: Path, computed: str) -> str:
    """Return the identity of the working directory whose gangs keep their state in `directory`.

    The first run stores the identity that it computes from its options; later runs use the stored one.
    It is not random: if somebody deletes `.snakemake`, a run with the same options still finds its gangs.
    """
    path = directory / IDENTITY_FILE
    if not path.exists():
        write_atomically(path, computed + "\n")
    return path.read_text().strip()


def record_creation(state_dir: str, kind: str, namespace: str) -> None:
    """Record the kind and the namespace in which a gang is about to be created."""
    write_atomically(Path(state_dir, "made-as"), f"{kind} {namespace}\n")


def last_creation(state_dir: str) -> tuple[str, str]:
    """Return the kind and the namespace of a gang's last creation; empty if there was none."""
    path = Path(state_dir, "made-as")
    kind, _, namespace = path.read_text().strip().partition(" ") if path.exists() else ("", "", "")
    return kind, namespace


def write_pod_files(spec: GangSpec) -> None:
    """Write the files that a gang's pods read, its token among them."""
    for name, text in manifest.files(spec).items():
        write_atomically(Path(spec.state_dir, name), text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that pods never see part of it, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
