"""Manage artefacts: list them, say why one is built again, adopt, remove and verify them.

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

from rlhf.config import overrides, yaml_file
from rlhf.config.scenario import load_config
from rlhf.errors import UserError, run_main
from rlhf.store import codehash, inventory, naming, plan, provenance

PROJECT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = parser().parse_args()
    configfile = getattr(args, "configfile", None)  # options may be before or after the command
    settings = load_config(tree_of(configfile))
    pvc = getattr(args, "pvc", None) or PROJECT / settings.pvc
    if not pvc.is_dir():
        raise UserError(f"{pvc} is not a directory: give --pvc, or correct pvc in config.yaml")
    os.chdir(pvc)
    planned = plan.plan(settings, codehash.digest, lambda source: naming.fingerprint(Path(source)))
    volume = inventory.Volume(Path(), planned)
    if args.command == "ls":
        print("\n".join(volume.listing()) or "there is no artefact yet")
    elif args.command == "why":
        print("\n".join(volume.why(args.name)))
    elif args.command == "adopt":
        print("\n".join(volume.adopt(args.name)))
    elif args.command == "gc":
        collect(volume, args.yes, configfile)
    else:
        verify(volume, args.name)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--configfile", type=Path, help="overrides config.yaml, as for Snakemake")
    common.add_argument("--pvc", type=Path, help="the volume; default: pvc of the configuration")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", parents=[common], help="list artefacts: size, age, path and results")
    for command, text in (
        ("why", "say how an artefact differs from the most similar one"),
        ("adopt", "declare an existing artefact, and those it is built from, valid for the current code"),
    ):
        commands.add_parser(command, parents=[common], help=text).add_argument("name")
    gc = commands.add_parser(
        "gc",
        parents=[common],
        help="list what no result and no scenario needs, and remove it after a question",
    )
    gc.add_argument("--yes", action="store_true", help="do not ask")
    verify = commands.add_parser("verify", parents=[common], help="compare files with their hashes")
    verify.add_argument("name", nargs="*")
    return parser


def tree_of(configfile: Path | None) -> dict[str, Any]:
    """Return config.yaml, overridden by another file if there is one."""
    tree: dict[str, Any] = {}
    for path in [PROJECT / "config.yaml", *([configfile] if configfile else [])]:
        tree = overrides.merge(tree, yaml_file.read(path))
    return tree


def collect(volume: inventory.Volume, yes: bool, configfile: Path | None) -> None:
    """List what no result and no scenario needs; remove it if the user agrees."""
    unused = volume.unused()
    if unused:
        files = (
            f"config.yaml and {configfile}"
            if configfile
            else "config.yaml; add others with --configfile FILE"
        )
        print(f"No result and no scenario needs these (scenarios of {files}):")
    for path in unused:
        print(volume.describe(path))
    for path in volume.incomplete():
        print(f"{path} has no {provenance.PROVENANCE}: an incomplete artefact, move it away or remove it")
    if not unused:
        print("every artefact is needed by a result or a scenario")
    elif yes or (sys.stdin.isatty() and input(f"remove these {len(unused)}? [y/N] ").lower() == "y"):
        kept = volume.remove(unused)
        print(f"removed {len(unused) - len(kept)}")
        for path in kept:
            print(f"kept: in use, or already removed by another process: {path}")
    else:
        hint = "" if sys.stdin.isatty() else ": stdin is not a terminal, give --yes to remove them"
        print(f"nothing removed{hint}")


def verify(volume: inventory.Volume, names: list[str]) -> None:
    """Compare artefacts with their provenance; without names, all of them.

    Raises:
        UserError: some differ; the text lists every difference.
    """
    paths = [volume.find(name) for name in names] or [*volume.present(), *volume.incomplete()]
    if lines := [f"{path}: {text}" for path in paths for text in inventory.differences(path)]:
        raise UserError("artefacts differ from their provenance:\n  " + "\n  ".join(lines))
    print(f"intact: {len(paths)} artefact{'s' if len(paths) != 1 else ''}")


if __name__ == "__main__":
    run_main(main)
