"""Bring a dataset to the volume, from the Hub or from a file or directory of the volume."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from rlhf import fetching, stage, store
from rlhf.errors import UserError, run_main

DATA = {".parquet", ".json", ".jsonl", ".csv", ".arrow"}
PACKED = {".gz", ".zst", ".xz", ".bz2"}
CARDS = ("README.md", "dataset_infos.json")  # which file belongs to which split


def is_data(name: str) -> bool:
    """Return whether a file holds rows."""
    suffixes = PurePath(name).suffixes
    last = suffixes[-2:-1] if suffixes and suffixes[-1] in PACKED else suffixes[-1:]
    return name not in CARDS and bool(DATA & set(last))


def choose(names: Iterable[str]) -> list[str]:
    """Return the files that are needed: rows, and the cards that name the splits."""
    names = list(names)
    found = [n for n in names if is_data(n)]
    if not found:
        raise UserError(
            "there are no rows in Parquet, JSON, JSON lines, CSV or Arrow; there are"
            f" {', '.join(sorted(names)[:20])}. For a dataset that is made by a script the Hub keeps a copy:"
            " set revision: refs/convert/parquet"
        )
    return found + [n for n in names if n in CARDS]


def main() -> None:
    args = stage.arguments(__doc__)
    fetched = fetching.fetch("dataset", args, choose)
    with stage.publish(args) as draft:
        draft.provenance["source"] = fetched.source
        for name in fetched.names:
            store.take(fetched.path / name, draft.path / "files" / name, fetched.ours)
        fetched.refuse_change()


if __name__ == "__main__":
    run_main(main)
