"""Bringing the files of a source to the volume, as they were published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import catalog, hub, lock, store
from rlhf.download import download
from rlhf.errors import UserError
from rlhf.stage import Arguments
from rlhf.workdir import hold

Choice = Callable[[Iterable[str]], list[str]]  # names of all files -> names of those that are needed

SNAPSHOT = "snapshot.json"
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Fetched:
    """Where the files of a source lie, and what the artefact's provenance says of them.

    `names` are those of the files that are needed. `ours`: they lie in our working directory and may
    be used up.
    """

    path: Path
    names: list[str]
    ours: bool
    source: dict[str, Any]

    def refuse_change(self) -> None:
        """Raise UserError if the user's files are no longer those that the plan saw."""
        if not self.ours and store.fingerprint(Path(self.source["path"])) != self.source["fingerprint"]:
            raise UserError(f"{self.source['path']} has changed since the run was planned: start it again")


def fetch(
    kind: str, args: Arguments, choose: Choice, have: Callable[[str], bool] = lambda _: False
) -> Fetched:
    """Return the files of a model or dataset that is on the Hub or on the volume.

    Args:
        kind: model or dataset.
        choose: which files are needed.
        have: whether what a file is needed for is done already.

    Raises:
        UserError: there is no such source, or it cannot be had; the text says what to do.
    """
    hold(args.work)
    name = args.spec["config"][kind]
    if catalog.kind(name) == "local":
        return _local(name, args.spec["config"]["fingerprint"], choose)
    snapshot = _snapshot(kind, name, args)
    lock.record(args.output, snapshot.commit)
    chosen = choose(f.name for f in snapshot.files)
    directory = args.work / "files"
    download(snapshot, [n for n in chosen if not have(n)], directory)
    hashes = {f.name: f.sha256 or f.blob_id for f in snapshot.files if f.name in chosen}
    source = {"repository": name, "revision": snapshot.revision, "commit": snapshot.commit, "files": hashes}
    return Fetched(directory, chosen, True, source)


def _local(name: str, fingerprint: str, choose: Choice) -> Fetched:
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{name} does not exist on the volume ({Path.cwd()}): bring it there, or correct the path"
        )
    folder = path if path.is_dir() else path.parent
    files = [
        p.relative_to(folder) for p in sorted(path.rglob("*") if path.is_dir() else [path]) if p.is_file()
    ]
    try:
        chosen = choose(p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    for file in chosen:
        _refuse_pointer(folder / file)
    fetched = Fetched(folder, chosen, False, {"path": name, "fingerprint": fingerprint})
    fetched.refuse_change()
    return fetched


def _refuse_pointer(path: Path) -> None:
    """Refuse what a clone without Git LFS has in the place of a large file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in {path.parent}"
            )


def _snapshot(kind: str, name: str, args: Arguments) -> hub.Snapshot:
    """Return the commit that an interrupted download began with, or else ask the Hub."""
    noted = args.work / SNAPSHOT
    if noted.exists():
        return hub.Snapshot.from_json(json.loads(noted.read_text()))
    revision, recorded = args.spec["config"]["revision"], lock.commit_of(args.output)
    snapshot = hub.snapshot(kind, name, revision, recorded)
    draft = noted.with_suffix(".partial")
    store.write_json(draft, snapshot.as_json())
    draft.rename(noted)
    return snapshot
