"""What every entry script shares: its command line, and publishing with a record of the run."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf import store
from rlhf.config import RlhfRun, Section, TrainingRun

Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True)
class Arguments:
    """What a rule hands to its script.

    `spec` is the planned artefact (stage, config, parents, code), `output` where it goes, `work`
    where the state of an unfinished training lies, `board` where TensorBoard's files go, `run` how
    it is run: of trainings only. `started` is the time of the start, in seconds since the epoch.
    """

    spec: dict[str, Any]
    output: Path
    work: Path
    board: Path
    run: Any
    started: float

    @property
    def parents(self) -> dict[str, Path]:
        """Role -> path of what the artefact is made from."""
        return {role: Path(path) for role, path in self.spec["parents"].items()}


def arguments(description: str | None) -> Arguments:
    """Read the command line of an entry script.

    Raises:
        UserError: the artefact exists already.
    """
    started = time.time()
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--spec", type=json.loads, required=True, help="the planned artefact, JSON")
    parser.add_argument("--output", type=Path, required=True, help="the artefact's directory")
    parser.add_argument("--work", type=Path, help="directory for the state of a training")
    parser.add_argument("--board", type=Path, help="directory for TensorBoard's files")
    parser.add_argument("--run", type=json.loads, help="how it is run, JSON")
    args = parser.parse_args()
    store.refuse_existing(args.output)
    kind = RlhfRun if args.spec["stage"] in ("rlhf", "eval") else TrainingRun
    run = kind.model_validate(args.run) if args.run else None
    return Arguments(args.spec, args.output, args.work, args.board, run, started)


def settings(kind: type[Settings], args: Arguments) -> Settings:
    """Return the stage's section of the configuration, as the plan resolved it."""
    what = {name: value for name, value in args.spec["config"].items() if name != "seed"}
    return kind.model_validate({**what, "run": args.run})


@contextmanager
def publish(args: Arguments) -> Iterator[store.Draft]:
    """Publish the artefact; `run.json` gets times and what the block adds.

    Rank 0 publishes. Other processes run the block too, for what all must do together; what they
    leave in their draft is dropped.
    """
    if os.environ.get("RANK", "0") != "0":
        with tempfile.TemporaryDirectory() as nowhere:
            yield store.Draft(Path(nowhere), {})
        return
    with store.publish(args.output, args.spec) as draft:
        yield draft
        draft.run |= {
            "started": _clock(args.started), "seconds": round(time.time() - args.started, 1),
            "host": os.uname().nodename, "machine": os.uname().machine, "cpus": os.cpu_count(),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "run": args.run.model_dump() if args.run else None,
        }  # fmt: skip


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
