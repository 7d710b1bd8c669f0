"""Fetch a dataset from the Hub, or copy it from a file or directory of the volume."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import PurePath

from rlhf.config import catalog
from rlhf.data.discovery import CARD, SAVED, format_of
from rlhf.entry.job import read_job
from rlhf.errors import UserError, run_main
from rlhf.sources import fetching
from rlhf.store import publishing
from rlhf.store.layout import FILES

CARDS = (CARD, "dataset_infos.json")  # the first may assign files to splits

LOCAL_REMEDY = "convert them to one of these"
HUB_REMEDY = (
    "if a script builds the dataset, the Hub has a copy in Parquet: set revision: refs/convert/parquet"
)


def choose(names: Iterable[str], remedy: str = LOCAL_REMEDY) -> list[str]:
    """Return the files that are needed: those with rows, and the cards that assign them to splits.

    Args:
        remedy: what to do if no file contains rows, for the message.

    Raises:
        UserError: no file contains rows.
    """
    names = list(names)
    chosen = [n for n in names if format_of(n) or PurePath(n).name in SAVED]
    if not chosen:
        present = ", ".join(sorted(names)[:20]) or "no file"
        raise UserError(f"no rows in Parquet, JSON, JSON lines, CSV or Arrow (found {present}): {remedy}")
    return chosen + [n for n in names if n in CARDS]


def main() -> None:
    job = read_job(__doc__)
    source = fetching.Source.of("dataset", job.spec["config"], job.output, job.work)
    remedy = HUB_REMEDY if catalog.origin(source.name) == "hub" else LOCAL_REMEDY
    fetched = fetching.fetch(source, partial(choose, remedy=remedy))
    with job.publish() as draft:
        draft.provenance["source"] = fetched.record
        for name in fetched.names:
            publishing.add_file(fetched.path / name, draft.path / FILES / name, fetched.ours)
        fetched.refuse_change()


if __name__ == "__main__":
    run_main(main)
