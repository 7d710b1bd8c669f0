"""A job: what a rule hands to its entry script, and publishing the artefact that the script makes."""

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

from rlhf.config.section import Section
from rlhf.config.training import RlhfRun, TrainingRun
from rlhf.machine import is_rank_zero
from rlhf.store import publishing

Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True)
class Job:
    """One job of an entry script; only trainings and comparisons have a `run`."""

    spec: dict[str, Any]  # the planned artefact: stage, configuration, seed, parents, code
    output: Path  # the artefact's directory
    work: Path  # unfinished work on it
    board: Path  # TensorBoard's files
    run: Any  # how the stage is executed
    started: float  # seconds since the epoch

    @property
    def parents(self) -> dict[str, Path]:
        """Role -> path of the artefacts that this one is made from."""
        return {role: Path(path) for role, path in self.spec["parents"].items()}

    @property
    def seed(self) -> int:
        """The seed of everything random in the stage."""
        return int(self.spec["seed"])

    def settings(self, section: type[Settings]) -> Settings:
        """Return the stage's section of the configuration, with its `run`, as the plan resolved it."""
        return section.model_validate({**self.spec["config"], "run": self.run})

    @contextmanager
    def publish(self) -> Iterator[publishing.Draft]:
        """Publish the artefact; `run.json` gets times and what the block adds.

        Rank 0 publishes. Other processes run the block too, for what all must do together; their
        drafts are dropped.
        """
        if not is_rank_zero():
            with tempfile.TemporaryDirectory() as nowhere:
                yield publishing.Draft(Path(nowhere), {})
            return
        with publishing.publish(self.output, self.spec) as draft:
            yield draft
            draft.run |= self._record()

    def _record(self) -> dict[str, Any]:
        """Return when, where and how the job ran."""
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "host": os.uname().nodename,
            "machine": os.uname().machine,
            "cpus": os.cpu_count(),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "run": self.run.model_dump() if self.run else None,
        }


def read_job(description: str | None) -> Job:
    """Read the command line of an entry script.

    Raises:
        UserError: the artefact exists already.
    """
    started = time.time()
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--spec", type=json.loads, required=True, help="the planned artefact, JSON")
    parser.add_argument("--output", type=Path, required=True, help="the artefact's directory")
    parser.add_argument("--work", type=Path, help="directory for unfinished work")
    parser.add_argument("--board", type=Path, help="directory for TensorBoard's files")
    parser.add_argument("--run", type=json.loads, help="how the stage is executed, JSON")
    args = parser.parse_args()
    publishing.refuse_existing(args.output)
    section = RlhfRun if args.spec["stage"] in ("rlhf", "eval") else TrainingRun
    run = section.model_validate(args.run) if args.run else None
    return Job(args.spec, args.output, args.work, args.board, run, started)
