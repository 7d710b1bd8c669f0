"""Remove gangs that nobody waits for any more: `python -m snakemake_executor_plugin_kubernetes_gang gc`.

Shown first, deleted after a question. Running gangs are never touched.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from . import manifest, status
from .cluster import ApiError, Cluster, Unreachable

HELPERS = ("Service", "TrainingRuntime")
ENDS = ("Complete", "Completed", "Failed")  # conditions, of all kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["gc"])
    parser.add_argument("--namespace", help="default: the one of the credentials")
    parser.add_argument("--context", help="of the kubeconfig")
    parser.add_argument("--hours", type=float, default=24.0, help="leave what has ended since (default: 24)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    args = parser.parse_args()
    try:
        cluster = Cluster(args.context, args.namespace, lambda text: print(text, file=sys.stderr))
        found = orphans(cluster, args.hours)
    except (ApiError, Unreachable) as error:
        sys.exit(f"error: {error}")
    for thing, why in found:
        print(f"{_name(thing)}: {why}, {'made' if thing['kind'] in HELPERS else 'ended'} {_since(thing)}")
    if not found:
        print("nothing to remove")
    elif args.yes or _is_agreed(f"delete these {len(found)}? [y/N] "):
        _delete(cluster, [thing for thing, _ in found])
    else:
        print("nothing deleted; answer y, or give --yes")


def _name(thing: dict[str, Any]) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def _is_agreed(question: str) -> bool:
    """Whether somebody says yes; where nobody can be asked, nobody does."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return input(question).strip().lower() == "y"
    except EOFError:
        return False


def _delete(cluster: Cluster, things: list[dict[str, Any]]) -> None:
    """Delete what may be deleted, and exit with an error that names the rest."""
    refused = []
    for thing in things:
        try:
            cluster.delete(thing, patient=False)
        except ApiError as error:
            refused.append(f"{_name(thing)}: {error}")
        except Unreachable as error:
            sys.exit(f"error: {error}")
    if refused:
        sys.exit("\n".join([f"error: {len(refused)} of {len(things)} could not be deleted:", *refused]))


def orphans(cluster: Cluster, hours: float) -> list[tuple[dict[str, Any], str]]:
    """Return ended gangs, and helpers whose gang was never made, since more than `hours`; and why.

    Raises:
        ApiError, Unreachable: they cannot be listed.
    """
    found = []
    for kind in (*manifest.KINDS.values(), *HELPERS):
        for thing in _listed(cluster, kind):
            age = time.time() - status.seconds(_since(thing))
            why = _why(thing)
            if why and age > hours * 3600:
                found.append((thing, why))
    return found


def _listed(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    selector = ",".join(f"{name}={value}" for name, value in manifest.MANAGED_BY.items())
    try:
        cluster.once("GET", cluster.path(kind), {"limit": 1})
    except ApiError as error:
        if error.status == 404:  # a backend that this cluster has not
            return []
        if error.status == 403:
            print(f"{kind}s are left out, for they may not be listed: {error}", file=sys.stderr)
            return []
        raise
    return cluster.list_all(kind, selector)


def _why(thing: dict[str, Any]) -> str:
    if thing["kind"] in HELPERS:
        return "" if thing["metadata"].get("ownerReferences") else "belongs to no gang"
    read = status.read(thing, (), 1)
    return f"has {read.phase}" if read.ended else ""


def _since(thing: dict[str, Any]) -> str:
    """When a gang ended, or a helper was made; when a gang was made, where its end is not told."""
    found = status.conditions(thing)
    stamps: list[str | None] = [found.get(kind, {}).get("lastTransitionTime") for kind in ENDS]
    stamps.append(thing.get("status", {}).get("completionTime"))
    made: str = thing["metadata"]["creationTimestamp"]
    return max(filter(None, stamps), key=status.seconds, default=made)


if __name__ == "__main__":
    main()
