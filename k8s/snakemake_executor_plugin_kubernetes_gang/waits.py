"""Why a gang that was asked for does not start, in one sentence: pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import status

Json = Mapping[str, Any]

# A kubelet tries again within two minutes: a warning that has not come since then has passed.
STALE_S = 150.0
AT_ONCE = ("ErrImageNeverPull", "InvalidImageName")  # no second try will do better
IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
)
CONFIG_REASONS = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "StartError",
    "ContainerCannotRun",
)


@dataclass(frozen=True)
class Cause:
    """A reason in one word, what happened, the evidence, what to do; `transient`: another try may do better."""

    reason: str
    what: str
    evidence: str = ""
    advice: str = ""
    transient: bool = False

    def sentence(self) -> str:
        evidence = f" ({short(self.evidence)})" if self.evidence else ""
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.what}{evidence}{advice}."


@dataclass(frozen=True)
class Case:
    """All that is known about a gang: its object, pods by rank, events, the end of each rank's log.

    `now` is in seconds since the epoch, `nodes` how many pods there should be, `asked` what each asks for.
    """

    gang: Json
    pods: Sequence[Json] = ()
    events: Sequence[Json] = ()
    tails: Mapping[int, str] | None = None
    asked: str = ""
    nodes: int = 1
    now: float = 0.0


def why(case: Case) -> Cause | None:
    """Return why a gang that has not started does not, if the cluster says."""
    for check in WAITS:
        cause = check(case)
        if cause:
            return cause
    return None


def short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def name_of(pod: Json) -> str:
    return f"pod {pod['metadata']['name']}"


def _event(case: Case, *reasons: str) -> Json:
    """The newest event with one of these reasons."""
    found = [event for event in case.events if event.get("reason") in reasons]
    return max(found, key=last_seen, default={})


def last_seen(event: Json) -> float:
    """Return when an event was last seen, in seconds since the epoch."""
    series = event.get("series") or {}
    stamps = (event.get("lastTimestamp"), event.get("eventTime"), series.get("lastObservedTime"))
    return max((status.seconds(stamp) for stamp in stamps if stamp), default=0.0)


def _setup_event(case: Case, *reasons: str) -> Json:
    """The newest warning about a pod that is not set up yet. One that has been mended explains nothing."""
    names = {pod["metadata"]["name"] for pod in case.pods if not _is_set_up(pod)}
    about = [event for event in case.events if event.get("involvedObject", {}).get("name") in names]
    event = _event(replace(case, events=about), *reasons)
    return event if case.now - last_seen(event) < STALE_S else {}


def _is_set_up(pod: Json) -> bool:
    """Whether a pod has its volumes and its sandbox; nodes before 1.29 say so only when it runs."""
    state = status.container(pod).get("state", {})
    return "PodReadyToStartContainers" in status.conditions(pod) or bool(
        state.keys() & {"running", "terminated"}
    )


def _waiting(case: Case, reasons: tuple[str, ...]) -> tuple[Json, str, Json] | None:
    """The first container that waits for one of these reasons: its pod, its name, its words."""
    for pod in case.pods:
        found = pod.get("status", {})
        for entry in (*(found.get("initContainerStatuses") or ()), *(found.get("containerStatuses") or ())):
            waiting = entry.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in reasons:
                return pod, entry["name"], waiting
    return None


def _image_of(pod: Json, name: str) -> str:
    """The image that a pod's container asks for; its status may name it otherwise."""
    spec = pod["spec"]
    containers = (*spec.get("initContainers", ()), *spec["containers"])
    images: dict[str, str] = {c["name"]: c["image"] for c in containers}
    return images[name]


def image(case: Case) -> Cause | None:
    found = _waiting(case, IMAGE_REASONS)
    if not found:
        return None
    pod, name, waiting = found
    # A pull that fails alternates between two reasons.
    reason = (
        "image" if "Pull" in waiting["reason"] and waiting["reason"] not in AT_ONCE else waiting["reason"]
    )
    return Cause(
        reason,
        f"{name_of(pod)} cannot get its image {_image_of(pod, name)}",
        f"{waiting['reason']}: {waiting.get('message', '')}",
        "check the name, the registry and imagePullSecrets",
    )


def config(case: Case) -> Cause | None:
    found = _waiting(case, CONFIG_REASONS)
    if not found:
        return None
    pod, _, waiting = found
    return Cause(
        waiting["reason"],
        f"{name_of(pod)} cannot be configured",
        f"{waiting['reason']}: {waiting.get('message', '')}",
        "make the Secret or ConfigMap that it names, or correct the pod template",
    )


def _mount(case: Case) -> Cause | None:
    event = _setup_event(case, "FailedMount", "FailedAttachVolume")
    if not event:
        return None
    return Cause(
        "FailedMount",
        "a volume cannot be mounted",
        f"{event['reason']}: {event.get('message', '')}",
        "check the claim, the Secret or the path that it names",
    )


def _sandbox(case: Case) -> Cause | None:
    event = _setup_event(case, "FailedCreatePodSandBox", "FailedCreatePodContainer", "NetworkNotReady")
    if not event:
        return None
    return Cause(
        "FailedCreatePodSandBox",
        "the node cannot set up the pod",
        f"{event['reason']}: {event.get('message', '')}",
        "have the node's network and runtime class looked at",
        transient=True,
    )


def _quota(case: Case) -> Cause | None:
    event = _event(case, "FailedCreate")
    if not event or len(case.pods) >= case.nodes:
        return None
    text = event.get("message", "")
    if "exceeded quota" in text:
        return Cause(
            "quota",
            f"the namespace's quota leaves no room for this gang, which asks for {case.asked}",
            text,
            "it starts when others have ended; ask for less, or for more quota",
        )
    return Cause(
        "FailedCreate",
        "the cluster refuses this gang's pods",
        text,
        "correct the pod template, or ask the cluster's administrator",
    )


def _unscheduled(case: Case) -> tuple[Json, str] | None:
    """The first pod that the scheduler cannot place, and its words."""
    for pod in case.pods:
        for c in pod.get("status", {}).get("conditions") or []:
            is_placed = c["type"] != "PodScheduled" or c["status"] != "False"
            if not is_placed and c.get("reason") in ("Unschedulable", "SchedulerError"):
                return pod, c.get("message", "")
    return None


def _claim(case: Case) -> Cause | None:
    """A claim that is missing looks like a lack of nodes, but none that becomes free will help."""
    pod, text = _unscheduled(case) or ({}, "")
    if not re.search(r'persistentvolumeclaim "[^"]*" |unbound .*PersistentVolumeClaims', text):
        return None
    return Cause(
        "claim",
        f"a claim of {name_of(pod)} is not there, or has no volume",
        text,
        "make the claim in the gang's namespace, or correct its name in the option volumes or the pod template",
    )


def _unschedulable(case: Case) -> Cause | None:
    pod, text = _unscheduled(case) or ({}, "")
    if not pod:
        return None
    return Cause(
        "unschedulable",
        f"no node can take {name_of(pod)}; the gang asks for {case.asked}",
        text,
        "wait for nodes to become free, or ask for less",
    )


def kueue(workload: Json) -> Cause | None:
    """Return why Kueue does not admit a workload, None once it has."""
    found = status.conditions(workload)
    if "Admitted" in found:
        return None
    queue = workload.get("spec", {}).get("queueName", "?")
    advice = "it starts when others have ended"
    if "Evicted" in found:
        what = f"it was taken back into the queue {queue}, and will go on from its checkpoint"
        return Cause("queue-again", what, found["Evicted"].get("message", ""), advice)
    for c in workload.get("status", {}).get("conditions") or []:
        if c["type"] == "QuotaReserved" and c["status"] == "False":
            return Cause("queue", f"it waits in the queue {queue}", c.get("message", ""), advice)
    return None


Check = Callable[[Case], "Cause | None"]
WAITS: tuple[Check, ...] = (image, config, _mount, _sandbox, _quota, _claim, _unschedulable)
