"""Delete finished gangs that no controller waits for: `python -m snakemake_executor_plugin_kubernetes_gang gc`.

Lists them first and asks before it deletes. Running gangs are never touched.
"""

from __future__ import annotations

import argparse
import sys
import time

from . import status
from .cluster import ApiError, Cluster, Unreachable
from .objects import HELPERS, KINDS, MANAGED_BY, Json


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["gc"])
    parser.add_argument("--namespace", help="default: the namespace of the credentials")
    parser.add_argument("--context", help="context of the kubeconfig")
    parser.add_argument("--hours", type=float, default=24.0, help="keep what is not older (default: 24)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = _arguments()
    try:
        cluster = Cluster(args.context, args.namespace, lambda text: print(text, file=sys.stderr))
        orphaned = orphans(cluster, args.hours)
    except (ApiError, Unreachable) as error:
        sys.exit(f"error: {error}")
    for obj, reason in orphaned:
        verb = "created" if obj["kind"] in HELPERS else "ended"
        print(f"{_name(obj)}: {reason}, {verb} {_since(obj)}")
    if not orphaned:
        print("nothing to remove")
    elif args.yes or _is_agreed(f"delete these {len(orphaned)}? [y/N] "):
        _delete(cluster, [obj for obj, _ in orphaned])
    else:
        print("nothing deleted: answer y, or pass --yes")


def _name(obj: Json) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"


def _is_agreed(question: str) -> bool:
    """Whether the user answers yes; without a terminal the answer is no."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return input(question).strip().lower() == "y"
    except EOFError:
        return False


def _delete(cluster: Cluster, orphaned: list[Json]) -> None:
    """Delete as many objects as possible; exit with an error that names the others."""
    refused = []
    for obj in orphaned:
        try:
            cluster.delete(obj, patient=False)
        except ApiError as error:
            refused.append(f"{_name(obj)}: {error}")
        except Unreachable as error:
            sys.exit(f"error: {error}")
    if refused:
        sys.exit("\n".join([f"error: {len(refused)} of {len(orphaned)} could not be deleted:", *refused]))


def orphans(cluster: Cluster, hours: float) -> list[tuple[Json, str]]:
    """Return gangs that ended, and helpers without a gang, more than `hours` ago; each with the reason.

    Raises:
        ApiError, Unreachable: the objects cannot be listed.
    """
    orphaned = []
    for kind in (*KINDS.values(), *HELPERS):
        for obj in _listed(cluster, kind):
            age = time.time() - status.seconds(_since(obj))
            reason = _reason(obj)
            if reason and age > hours * 3600:
                orphaned.append((obj, reason))
    return orphaned


def _listed(cluster: Cluster, kind: str) -> list[Json]:
    selector = ",".join(f"{name}={value}" for name, value in MANAGED_BY.items())
    try:
        cluster.once("GET", cluster.path(kind), {"limit": 1})
    except ApiError as error:
        if error.status == 404:  # this backend is not installed in the cluster
            return []
        if error.status == 403:
            print(f"{kind}s are skipped because they may not be listed: {error}", file=sys.stderr)
            return []
        raise
    return cluster.list_all(kind, selector)


def _reason(obj: Json) -> str:
    if obj["kind"] in HELPERS:
        return "" if obj["metadata"].get("ownerReferences") else "belongs to no gang"
    gang = status.read(obj, (), 1)
    return f"has {gang.phase}" if gang.ended else ""


def _since(obj: Json) -> str:
    """When a gang ended; when it was created if its object does not say, and for helpers."""
    created: str = obj["metadata"]["creationTimestamp"]
    return status.ended_at(obj) or created


if __name__ == "__main__":
    main()
