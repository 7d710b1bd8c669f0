"""What the objects of a cluster say about a gang: pure functions of their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Json = Mapping[str, Any]

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
# A condition that is True ends a gang: with success or without.
ENDS = {
    "Job": {"Complete": "succeeded", "Failed": "failed"},
    "JobSet": {"Completed": "succeeded", "Failed": "failed"},
    "TrainJob": {"Complete": "succeeded", "Failed": "failed"},
}
# Decided by phase, then by Failed: a failed DeepSpeedJob is Completed too in newer versions.
DEEPSPEED_ENDS = {"Succeeded": "succeeded", "Failed": "failed"}


@dataclass(frozen=True)
class Status:
    """A gang: phase queued, pending, starting, running, succeeded or failed; pods by rank."""

    phase: str
    pods: tuple[Json, ...] = ()
    running: int = 0
    reason: str = ""
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.phase in ("succeeded", "failed")


def conditions(thing: Json) -> dict[str, Json]:
    """Return the conditions of an object that are True, by type."""
    found = thing.get("status", {}).get("conditions") or []
    return {c["type"]: c for c in found if c.get("status") == "True"}


def read(gang: Json, pods: Iterable[Json], nodes: int) -> Status:
    """Return the status of a gang of `nodes` pods from its object and all pods it ever had."""
    newest = newest_by_rank(pods)
    running = sum(has_started(pod) for pod in newest)
    phase, condition = _end(gang)
    # Worker 0 alone decides for this controller, which may be done before it hears of another.
    if phase == "succeeded" and gang["kind"] == "DeepSpeedJob" and any(map(_has_failed, newest)):
        phase = "failed"
    if not phase:
        phase = _phase(gang, newest, running, nodes)
    return Status(phase, newest, running, condition.get("reason", ""), condition.get("message", ""))


def _end(gang: Json) -> tuple[str, Json]:
    """The end of a gang, if it has one, and the condition that tells."""
    found = conditions(gang)
    if gang["kind"] == "DeepSpeedJob":
        phase = DEEPSPEED_ENDS.get(gang.get("status", {}).get("phase", ""), "")
        if not phase and "Failed" in found:
            phase = "failed"
        return phase, found.get("Failed") or found.get("ReplicaFailure") or {}
    for kind, phase in ENDS[gang["kind"]].items():
        if kind in found:
            return phase, found[kind]
    return "", {}


def _phase(gang: Json, pods: tuple[Json, ...], running: int, nodes: int) -> str:
    # A queue may take a gang back while it runs: its pods are still there then.
    if gang.get("spec", {}).get("suspend") is True or ("Suspended" in conditions(gang) and not pods):
        return "queued"
    if running == nodes:
        return "running"
    return "starting" if running else "pending"


def rank(pod: Json) -> int:
    """Return a pod's rank: its index in the job, or the number at the end of `<job>-worker-<i>`."""
    index = pod["metadata"].get("labels", {}).get(INDEX_LABEL)
    if index is None:
        found = re.search(r"-worker-(\d+)$", pod["metadata"]["name"])
        index = found.group(1) if found else "0"
    return int(index)


def newest_by_rank(pods: Iterable[Json]) -> tuple[Json, ...]:
    """Return the newest pod of each rank: an evicted one stays listed beside its replacement."""
    newest: dict[int, Json] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp", "")):
        newest[rank(pod)] = pod
    return tuple(newest[r] for r in sorted(newest))


def has_started(pod: Json) -> bool:
    """Whether a pod runs, or has done its part, and is not being taken away."""
    return (
        pod.get("status", {}).get("phase") in ("Running", "Succeeded")
        and "deletionTimestamp" not in pod["metadata"]
    )


def is_broken(pod: Json) -> bool:
    """Whether a pod has failed or is being taken away: its gang cannot go on."""
    return _has_failed(pod) or "deletionTimestamp" in pod["metadata"]


def _has_failed(pod: Json) -> bool:
    """Whether a pod has failed by itself: one that is taken away may be called so as well."""
    return pod.get("status", {}).get("phase") == "Failed" and "deletionTimestamp" not in pod["metadata"]


def container(pod: Json) -> Json:
    """Return the status of the container that runs the command; empty before the kubelet has it."""
    found = pod.get("status", {}).get("containerStatuses") or [{}]
    named: list[Json] = [c for c in found if c.get("name") in ("main", "node", "worker")]
    return named[0] if named else dict(found[0])


def terminated(pod: Json) -> Json:
    """Return how the command's container ended; empty while it has not."""
    ended: Json = container(pod).get("state", {}).get("terminated") or {}
    return ended


def seconds(stamp: str) -> float:
    """Return a timestamp of the API as seconds since the epoch."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def run_seconds(pods: Iterable[Json]) -> float:
    """Return how long a gang's containers ran, by the cluster's clock; 0 where it does not say."""
    ends = [terminated(pod) for pod in pods]
    starts = [seconds(end["startedAt"]) for end in ends if end.get("startedAt")]
    stops = [seconds(end["finishedAt"]) for end in ends if end.get("finishedAt")]
    return max(stops) - min(starts) if starts and stops else 0.0
