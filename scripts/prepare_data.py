"""Tokenise the rows of one stage."""

from __future__ import annotations

from rlhf.config.stages import Preparation
from rlhf.data import preparation
from rlhf.entry.job import read_job
from rlhf.errors import run_main
from rlhf.store.layout import DATASET, TOKENIZER


def main() -> None:
    job = read_job(__doc__)
    config = Preparation.model_validate(job.spec["config"])
    parents = job.parents
    tokenizer = parents.pop(TOKENIZER)
    datasets = {role.removeprefix(DATASET): path for role, path in parents.items()}
    with job.publish() as draft:
        preparation.prepare(config, tokenizer, datasets, draft.path)


if __name__ == "__main__":
    run_main(main)
