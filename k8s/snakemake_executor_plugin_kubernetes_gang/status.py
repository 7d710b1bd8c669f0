"""What a cluster's objects say about a gang: pure functions of their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from .objects import DEEPSPEEDJOB_MAIN, INDEX_LABEL, MAIN, TRAINJOB_MAIN, Json

# The conditions that end a gang when they are True, and the phase that they mean.
ENDS = {
    "Job": {"Complete": "succeeded", "Failed": "failed"},
    "JobSet": {"Completed": "succeeded", "Failed": "failed"},
    "TrainJob": {"Complete": "succeeded", "Failed": "failed"},
}
END_CONDITIONS = {condition for ends in ENDS.values() for condition in ends}  # DeepSpeedJob's as well
# The phase decides, then Failed: in newer versions a failed DeepSpeedJob is Completed, too.
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
        """Whether the gang has succeeded or failed."""
        return self.phase in ("succeeded", "failed")


def conditions(obj: Json) -> dict[str, Json]:
    """Return the conditions of an object that are True, by type."""
    entries = obj.get("status", {}).get("conditions") or []
    return {entry["type"]: entry for entry in entries if entry.get("status") == "True"}


def read(gang: Json, pods: Iterable[Json], nodes: int) -> Status:
    """Return the status of a gang of `nodes` pods, given its object and all pods that it ever had."""
    newest = newest_by_rank(pods)
    running = sum(has_started(pod) for pod in newest)
    phase, condition = _end(gang)
    # DeepSpeedJob's controller looks at worker 0 only, and may be done before another worker fails.
    if phase == "succeeded" and gang["kind"] == "DeepSpeedJob" and any(map(_has_failed, newest)):
        phase = "failed"
    phase = phase or _held(newest, nodes) or _phase(gang, newest, running, nodes)
    return Status(phase, newest, running, condition.get("reason", ""), condition.get("message", ""))


def _end(gang: Json) -> tuple[str, Json]:
    """The phase of a gang that has ended, and the condition that shows it; empty if it has not."""
    true = conditions(gang)
    if gang["kind"] == "DeepSpeedJob":
        phase = DEEPSPEED_ENDS.get(gang.get("status", {}).get("phase", ""), "")
        if not phase and "Failed" in true:
            phase = "failed"
        return phase, true.get("Failed") or true.get("ReplicaFailure") or {}
    for condition, phase in ENDS[gang["kind"]].items():
        if condition in true:
            return phase, true[condition]
    return "", {}


def _held(pods: tuple[Json, ...], nodes: int) -> str:
    """The phase of a gang whose commands have ended, but not all containers: a proxy or an agent beside them stays.

    The cluster does not end such a pod; its gang ends when it is deleted.
    """
    ends = [terminated(pod) for pod in pods]
    stays = [bool(end) and _has_running_container(pod) for pod, end in zip(pods, ends, strict=True)]
    if any(there and end.get("exitCode") for there, end in zip(stays, ends, strict=True)):
        return "failed"
    return "succeeded" if any(stays) and len(ends) == nodes and all(ends) else ""


def _has_running_container(pod: Json) -> bool:
    return any("running" in c.get("state", {}) for c in pod.get("status", {}).get("containerStatuses") or ())


def _phase(gang: Json, pods: tuple[Json, ...], running: int, nodes: int) -> str:
    # A queue may suspend a running gang: its pods still exist then.
    if gang.get("spec", {}).get("suspend") is True or ("Suspended" in conditions(gang) and not pods):
        return "queued"
    if running == nodes:
        return "running"
    return "starting" if running else "pending"


def ended_at(gang: Json) -> str:
    """Return when a gang ended, as a timestamp of the API; empty if its object does not say."""
    true = conditions(gang)
    stamps: list[str | None] = [true.get(name, {}).get("lastTransitionTime") for name in END_CONDITIONS]
    stamps.append(gang.get("status", {}).get("completionTime"))
    return max(filter(None, stamps), key=seconds, default="")


def rank(pod: Json) -> int:
    """Return a pod's rank: its index in the job, or the number at the end of `<job>-worker-<i>`."""
    index = pod["metadata"].get("labels", {}).get(INDEX_LABEL)
    if index is None:
        match = re.search(r"-worker-(\d+)$", pod["metadata"]["name"])
        index = match.group(1) if match else "0"
    return int(index)


def newest_by_rank(pods: Iterable[Json]) -> tuple[Json, ...]:
    """Return the newest pod of each rank: an evicted pod stays listed beside its replacement."""
    newest: dict[int, Json] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp", "")):
        newest[rank(pod)] = pod
    return tuple(newest[r] for r in sorted(newest))


def has_started(pod: Json) -> bool:
    """Whether a pod runs or has succeeded, and is not being deleted."""
    return (
        pod.get("status", {}).get("phase") in ("Running", "Succeeded")
        and "deletionTimestamp" not in pod["metadata"]
    )


def is_broken(pod: Json) -> bool:
    """Whether a pod has failed or is being deleted: its gang cannot continue."""
    return _has_failed(pod) or "deletionTimestamp" in pod["metadata"]


def _has_failed(pod: Json) -> bool:
    """Whether a pod has failed by itself: the phase of a deleted pod may be Failed as well."""
    return pod.get("status", {}).get("phase") == "Failed" and "deletionTimestamp" not in pod["metadata"]


def container(pod: Json) -> Json:
    """Return the status of the container that runs the command; empty until the kubelet reports it."""
    containers: list[Json] = pod.get("status", {}).get("containerStatuses") or [{}]
    main = [c for c in containers if c.get("name") in (MAIN, TRAINJOB_MAIN, DEEPSPEEDJOB_MAIN)]
    return (main or containers)[0]


def terminated(pod: Json) -> Json:
    """Return how the command's container ended; empty while it has not."""
    end: Json = container(pod).get("state", {}).get("terminated") or {}
    return end


def seconds(stamp: str) -> float:
    """Return a timestamp of the API as seconds since the epoch."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def run_seconds(pods: Iterable[Json]) -> float:
    """Return how long a gang's containers ran, by the cluster's clock; 0 if it is unknown."""
    ends = [terminated(pod) for pod in pods]
    starts = [seconds(end["startedAt"]) for end in ends if end.get("startedAt")]
    stops = [seconds(end["finishedAt"]) for end in ends if end.get("finishedAt")]
    return max(stops) - min(starts) if starts and stops else 0.0
