"""Tokenise the rows of one stage."""

from __future__ import annotations

from rlhf.config.stages import Preparation
from rlhf.data import preparation
from rlhf.entry.job import read_job
from rlhf.errors import run_main


def main() -> None:
    job = read_job(__doc__)
    config = Preparation.model_validate(job.spec["config"])
    datasets = {role.removeprefix("dataset:"): p for role, p in job.parents.items() if role != "tokenizer"}
    with job.publish() as draft:
        preparation.prepare(config, job.parents["tokenizer"], datasets, draft.path)


if __name__ == "__main__":
    run_main(main)
