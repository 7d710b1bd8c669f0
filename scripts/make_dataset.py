"""Make a built-in dataset: chats that come with a Python package."""

from __future__ import annotations

from rlhf import builtin_chats, stage
from rlhf.errors import run_main


def main() -> None:
    args = stage.arguments(__doc__)
    with stage.publish(args) as draft:
        builtin_chats.write_dataset(args.spec["config"], draft.path)


if __name__ == "__main__":
    run_main(main)
