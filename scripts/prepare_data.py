"""Tokenise the rows of one phase."""

from __future__ import annotations

from rlhf import preparation, stage
from rlhf.errors import run_main


def main() -> None:
    args = stage.arguments(__doc__)
    datasets = {r.removeprefix("dataset:"): p for r, p in args.parents.items() if r != "tokenizer"}
    with stage.publish(args) as draft:
        preparation.prepare(args.spec["config"], args.parents["tokenizer"], datasets, draft.path)


if __name__ == "__main__":
    run_main(main)
