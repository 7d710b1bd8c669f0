"""Bring a dataset to the volume, from the Hub or from a file or directory of the volume."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import PurePath

from rlhf import catalog, fetching, stage, store
from rlhf.errors import UserError, run_main

DATA = {".parquet", ".json", ".jsonl", ".csv", ".arrow"}
PACKED = {".gz", ".zst", ".xz", ".bz2"}
CARDS = ("README.md", "dataset_infos.json")  # which file belongs to which split

LOCAL_REMEDY = "convert them to one of these"
HUB_REMEDY = "if a script makes the dataset, the Hub keeps a copy: set revision: refs/convert/parquet"


def is_data(name: str) -> bool:
    """Return whether a file holds rows."""
    suffixes = PurePath(name).suffixes
    last = suffixes[-2:-1] if suffixes and suffixes[-1] in PACKED else suffixes[-1:]
    return name not in CARDS and bool(DATA & set(last))


def choose(names: Iterable[str], remedy: str = LOCAL_REMEDY) -> list[str]:
    """Return the files that are needed: rows, and the cards that name the splits.

    Raises:
        UserError: no file holds rows; `remedy` says what to do.
    """
    names = list(names)
    found = [n for n in names if is_data(n)]
    if not found:
        there = ", ".join(sorted(names)[:20]) or "no file"
        raise UserError(f"no rows in Parquet, JSON, JSON lines, CSV or Arrow (found {there}): {remedy}")
    return found + [n for n in names if n in CARDS]


def main() -> None:
    args = stage.arguments(__doc__)
    name = args.spec["config"]["dataset"]
    remedy = HUB_REMEDY if catalog.kind(name) == "hub" else LOCAL_REMEDY
    fetched = fetching.fetch("dataset", args, partial(choose, remedy=remedy))
    with stage.publish(args) as draft:
        draft.provenance["source"] = fetched.source
        for name in fetched.names:
            store.take(fetched.path / name, draft.path / "files" / name, fetched.ours)
        fetched.refuse_change()


if __name__ == "__main__":
    run_main(main)
