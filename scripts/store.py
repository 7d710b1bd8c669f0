"""Look after the artefacts: what is there, why it is made anew, and what may go.

    python scripts/store.py ls
    python scripts/store.py why results/tiny/rlhf/actor
    python scripts/store.py adopt results/tiny/rlhf/actor
    python scripts/store.py gc
    python scripts/store.py verify [NAME ...]

NAME is a name under results/, a path in the store, or the end of one (a key).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rlhf import codehash, config, layers, plan, store, upkeep, yaml_file
from rlhf.errors import UserError, run_main

PROJECT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = parser().parse_args()
    more = getattr(args, "configfile", None)  # either may stand before the command or after it
    settings = config.load(tree_of(more))
    place = getattr(args, "pvc", None) or PROJECT / settings.pvc
    if not place.is_dir():
        raise UserError(f"{place} is not a directory: give --pvc, or correct pvc in config.yaml")
    os.chdir(place)
    wanted = plan.plan(settings, codehash.digest, lambda source: store.fingerprint(Path(source)))
    volume = upkeep.Volume(Path(), wanted)
    if args.command == "ls":
        print("\n".join(volume.listing()) or "there is no artefact yet")
    elif args.command == "why":
        print("\n".join(volume.why(args.name)))
    elif args.command == "adopt":
        print("\n".join(volume.adopt(args.name)))
    elif args.command == "gc":
        collect(volume, args.yes, more)
    else:
        verify(volume, args.name)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    places = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    places.add_argument("--configfile", type=Path, help="laid over config.yaml, as Snakemake's")
    places.add_argument("--pvc", type=Path, help="the volume; by default what the configuration says")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        parents=[places],
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", parents=[places], help="what is there, size, age, and which results name it")
    for command, text in (
        ("why", "what differs from its nearest relative"),
        ("adopt", "declare an existing artefact, and what it is made from, valid for the current code"),
    ):
        commands.add_parser(command, parents=[places], help=text).add_argument("name")
    gc = commands.add_parser(
        "gc", parents=[places], help="remove what no result and no scenario asks for; shows first, asks"
    )
    gc.add_argument("--yes", action="store_true", help="do not ask")
    verify = commands.add_parser("verify", parents=[places], help="compare files with their hashes")
    verify.add_argument("name", nargs="*")
    return parser


def tree_of(more: Path | None) -> dict[str, Any]:
    """Return config.yaml, with another file laid over it."""
    tree: dict[str, Any] = {}
    for path in [PROJECT / "config.yaml", *([more] if more else [])]:
        tree = layers.merge(tree, yaml_file.read(path))
    return tree


def collect(volume: upkeep.Volume, yes: bool, more: Path | None) -> None:
    """Show what no result names and no scenario that was read asks for; remove it if the user agrees."""
    unused = volume.unused()
    if unused:
        read = (
            f"config.yaml and {more}"
            if more
            else "config.yaml; --configfile FILE reads those of another file too"
        )
        print(f"No result names these, and no scenario asks for them (scenarios of {read}):")
    for path in unused:
        print(volume.describe(path))
    for path in volume.broken():
        print(f"{path} has no {store.PROVENANCE}: not a whole artefact, move it away or remove it")
    if not unused:
        print("every artefact is named by a result, or part of one that is")
    elif yes or (sys.stdin.isatty() and input(f"remove these {len(unused)}? [y/N] ").lower() == "y"):
        left = volume.remove(unused)
        print(f"removed {len(unused) - len(left)}")
        for path in left:
            print(f"left, a process has taken it up or away: {path}")
    else:
        print(
            "nothing removed"
            + ("" if sys.stdin.isatty() else ": this is no terminal, give --yes to remove them")
        )


def verify(volume: upkeep.Volume, names: list[str]) -> None:
    """Check artefacts; raise UserError naming every difference."""
    paths = [volume.find(name) for name in names] or [*volume.present(), *volume.broken()]
    wrong = {path: found for path in paths if (found := upkeep.differences(path))}
    if wrong:
        lines = [f"{path}: {text}" for path, texts in wrong.items() for text in texts]
        raise UserError("artefacts differ from their provenance:\n  " + "\n  ".join(lines))
    print(f"whole: {len(paths)} artefact{'s' if len(paths) != 1 else ''}")


if __name__ == "__main__":
    run_main(main)
