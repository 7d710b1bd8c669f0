"""Make a built-in pretrained model: an untrained OPT."""

from __future__ import annotations

from rlhf import builtin_opt, stage
from rlhf.errors import run_main


def main() -> None:
    args = stage.arguments(__doc__)
    with stage.publish(args) as draft:
        builtin_opt.write_model(args.spec["config"], draft.path)


if __name__ == "__main__":
    run_main(main)
