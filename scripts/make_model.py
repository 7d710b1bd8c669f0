"""Make a built-in pretrained model: an untrained OPT."""

from __future__ import annotations

from rlhf.entry.job import read_job
from rlhf.errors import run_main
from rlhf.sources import builtin_opt


def main() -> None:
    job = read_job(__doc__)
    with job.publish() as draft:
        builtin_opt.write_model(job.spec["config"], draft.path)


if __name__ == "__main__":
    run_main(main)
