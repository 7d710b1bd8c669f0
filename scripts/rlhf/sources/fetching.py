"""Fetching the files of a model or dataset from the Hub or the volume, unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import catalog
from rlhf.errors import UserError
from rlhf.files import atomic_write, walk, write_json
from rlhf.sources import hub, lock
from rlhf.sources.download import download
from rlhf.store import naming
from rlhf.store.workdir import hold

Choice = Callable[[Iterable[str]], list[str]]  # names of all files -> names of those that are needed

SNAPSHOT = "snapshot.json"
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """A model or dataset on the Hub (with a `revision`) or on the volume (with a `fingerprint`)."""

    stage: Literal["model", "dataset"]
    name: str
    artefact: Path  # that is built from it
    work: Path  # the work directory, with unfinished downloads
    revision: str | None = None
    fingerprint: str | None = None

    @staticmethod
    def of(stage: Literal["model", "dataset"], config: dict[str, str], artefact: Path, work: Path) -> Source:
        """Return the source in the configuration of an artefact."""
        return Source(stage, config[stage], artefact, work, config.get("revision"), config.get("fingerprint"))


@dataclass(frozen=True)
class Fetched:
    """The files of a source on the volume."""

    path: Path
    names: list[str]  # of the files that are needed
    ours: bool  # the files are in our work directory and may be moved or deleted
    record: dict[str, Any]  # of the source, for the artefact's provenance

    def refuse_change(self) -> None:
        """Raise UserError if a user's files have changed since the artefact was planned."""
        if not self.ours and naming.fingerprint(Path(self.record["path"])) != self.record["fingerprint"]:
            raise UserError(f"{self.record['path']} has changed since the run was planned: start it again")


def fetch(source: Source, choose: Choice, done: Callable[[str], bool] = lambda _: False) -> Fetched:
    """Return the files of a source; those from the Hub are downloaded to its work directory.

    Args:
        choose: selects the files that are needed.
        done: whether a file has been processed already, so that it need not be downloaded again.

    Raises:
        UserError: there is no such source, or it cannot be fetched; the text says what to do.
    """
    hold(source.work)
    if catalog.origin(source.name) == "local":
        return _local(source, choose)
    snapshot = _snapshot(source)
    lock.record(source.artefact, snapshot.commit)
    chosen = choose(f.name for f in snapshot.files)
    directory = source.work / "files"
    download(snapshot, [n for n in chosen if not done(n)], directory)
    record = {
        "repository": source.name,
        "revision": snapshot.revision,
        "commit": snapshot.commit,
        "files": {f.name: f.sha256 or f.blob_id for f in snapshot.files if f.name in chosen},
    }
    return Fetched(directory, chosen, True, record)


def _local(source: Source, choose: Choice) -> Fetched:
    """Return the files of a source on the volume, where they are."""
    path = Path(source.name)
    if not path.exists():
        raise UserError(
            f"{path} does not exist on the volume ({Path.cwd()}): copy it there, or correct the path"
        )
    folder, paths = (path, walk(path)) if path.is_dir() else (path.parent, [path])
    files = [p.relative_to(folder) for p in paths]
    try:
        chosen = choose(p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts))
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    for file in chosen:
        _refuse_pointer(folder / file)
    record = {"path": source.name, "fingerprint": source.fingerprint}
    fetched = Fetched(folder, chosen, False, record)
    fetched.refuse_change()
    return fetched


def _refuse_pointer(path: Path) -> None:
    """Refuse a pointer of Git LFS, which a clone without LFS has instead of a large file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in {path.parent}"
            )


def _snapshot(source: Source) -> hub.Snapshot:
    """Return the snapshot of an interrupted download, or else request one from the Hub and save it."""
    saved = source.work / SNAPSHOT
    if saved.exists():
        return hub.Snapshot.from_json(json.loads(saved.read_text()))
    assert source.revision is not None, source
    recorded = lock.commit_of(source.artefact)
    snapshot = hub.snapshot(source.stage, source.name, source.revision, recorded)
    with atomic_write(saved) as partial:
        write_json(partial, snapshot.as_json())
    return snapshot
