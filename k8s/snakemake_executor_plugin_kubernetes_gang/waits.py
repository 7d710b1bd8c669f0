"""Why a gang does not start, in one sentence: pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from . import status
from .objects import Json

# A kubelet retries within two minutes: a warning that is older has been resolved.
STALE_S = 150.0
PERMANENT = ("ErrImageNeverPull", "InvalidImageName")  # a retry cannot help
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
    """A reason in one word, what happened, the evidence, and what to do; `transient`: a retry may help."""

    reason: str
    what: str
    evidence: str = ""
    advice: str = ""
    transient: bool = False

    def sentence(self) -> str:
        """Return what happened, the evidence and what to do, as one sentence."""
        evidence = f" ({short(self.evidence)})" if self.evidence else ""
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.what}{evidence}{advice}."


@dataclass(frozen=True)
class Case:
    """All that is known about a gang: its object, pods by rank, events, and the end of each rank's log.

    `now` is in seconds since the epoch. `nodes` is the expected number of pods, `requested` what they request.
    """

    gang: Json
    pods: Sequence[Json] = ()
    events: Sequence[Json] = ()
    tails: Mapping[int, str] | None = None
    requested: str = ""
    nodes: int = 1
    now: float = 0.0


def explain(case: Case) -> Cause | None:
    """Return why a gang does not start, if the cluster reports a reason."""
    for check in WAITS:
        cause = check(case)
        if cause:
            return cause
    return None


def short(text: str, limit: int = 300) -> str:
    """Return `text` on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def name_of(pod: Json) -> str:
    """Return a pod's name for messages."""
    return f"pod {pod['metadata']['name']}"


def _event(case: Case, *reasons: str) -> Json:
    """The newest event with one of these reasons."""
    events = [event for event in case.events if event.get("reason") in reasons]
    return max(events, key=last_seen, default={})


def last_seen(event: Json) -> float:
    """Return when an event was last seen, in seconds since the epoch."""
    series = event.get("series") or {}
    stamps = (event.get("lastTimestamp"), event.get("eventTime"), series.get("lastObservedTime"))
    return max((status.seconds(stamp) for stamp in stamps if stamp), default=0.0)


def _setup_event(case: Case, *reasons: str) -> Json:
    """The newest warning about a pod that is not set up yet, unless the problem has been resolved."""
    names = {pod["metadata"]["name"] for pod in case.pods if not _is_set_up(pod)}
    about = [event for event in case.events if event.get("involvedObject", {}).get("name") in names]
    event = _event(replace(case, events=about), *reasons)
    return event if case.now - last_seen(event) < STALE_S else {}


def _is_set_up(pod: Json) -> bool:
    """Whether a pod has its volumes and its sandbox; nodes before 1.29 report it only when the pod runs."""
    state = status.container(pod).get("state", {})
    has_run = bool(state.keys() & {"running", "terminated"})
    return has_run or "PodReadyToStartContainers" in status.conditions(pod)


def _waiting(case: Case, reasons: tuple[str, ...]) -> tuple[Json, str, Json] | None:
    """The first container that waits for one of these reasons: its pod, its name, and its state."""
    for pod in case.pods:
        pod_status = pod.get("status", {})
        init, main = (pod_status.get(key) or () for key in ("initContainerStatuses", "containerStatuses"))
        for entry in (*init, *main):
            waiting = entry.get("state", {}).get("waiting") or {}
            if waiting.get("reason") in reasons:
                return pod, entry["name"], waiting
    return None


def _image_of(pod: Json, name: str) -> str:
    """The image that a pod's container requests; its status may use another name."""
    spec = pod["spec"]
    containers = (*spec.get("initContainers", ()), *spec["containers"])
    images: dict[str, str] = {c["name"]: c["image"] for c in containers}
    return images[name]


def image(case: Case) -> Cause | None:
    """Return the cause if a container cannot get its image."""
    container = _waiting(case, IMAGE_REASONS)
    if not container:
        return None
    pod, name, waiting = container
    reason = waiting["reason"]
    if "Pull" in reason and reason not in PERMANENT:
        reason = "image"  # a pull that fails alternates between two reasons
    return Cause(
        reason,
        f"{name_of(pod)} cannot get its image {_image_of(pod, name)}",
        f"{waiting['reason']}: {waiting.get('message', '')}",
        "check the name, the registry and imagePullSecrets",
    )


def config(case: Case) -> Cause | None:
    """Return the cause if a container cannot be created as configured."""
    container = _waiting(case, CONFIG_REASONS)
    if not container:
        return None
    pod, _, waiting = container
    return Cause(
        waiting["reason"],
        f"{name_of(pod)} cannot be configured",
        f"{waiting['reason']}: {waiting.get('message', '')}",
        "create the Secret or ConfigMap that it names, or correct the pod template",
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
        "check the node's network and runtime class",
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
            f"the namespace's quota leaves no room for this gang, which requests {case.requested}",
            text,
            "it starts when others have ended; request less, or a larger quota",
        )
    return Cause(
        "FailedCreate",
        "the cluster refuses this gang's pods",
        text,
        "correct the pod template, or ask the cluster's administrator",
    )


def _unscheduled(case: Case) -> tuple[Json, str] | None:
    """The first pod that the scheduler cannot place, and the scheduler's message."""
    for pod in case.pods:
        for condition in pod.get("status", {}).get("conditions") or []:
            is_waiting = condition["type"] == "PodScheduled" and condition["status"] == "False"
            if is_waiting and condition.get("reason") in ("Unschedulable", "SchedulerError"):
                return pod, condition.get("message", "")
    return None


def _claim(case: Case) -> Cause | None:
    """A missing claim: the scheduler reports it like a lack of nodes, but free nodes do not help."""
    pod, text = _unscheduled(case) or ({}, "")
    if not re.search(r'persistentvolumeclaim "[^"]*" |unbound .*PersistentVolumeClaims', text):
        return None
    return Cause(
        "claim",
        f"a claim of {name_of(pod)} does not exist or has no volume",
        text,
        "create the claim in the gang's namespace, or correct its name in the option volumes or the pod template",
    )


def _unschedulable(case: Case) -> Cause | None:
    pod, text = _unscheduled(case) or ({}, "")
    if not pod:
        return None
    return Cause(
        "unschedulable",
        f"no node can take {name_of(pod)}; the gang requests {case.requested}",
        text,
        "wait for nodes to become free, or request less",
    )


def kueue(workload: Json) -> Cause | None:
    """Return why Kueue does not admit a workload; None if it has admitted it."""
    true = status.conditions(workload)
    if "Admitted" in true:
        return None
    queue = workload.get("spec", {}).get("queueName", "?")
    advice = "it starts when others have ended"
    if "Evicted" in true:
        what = f"it was returned to the queue {queue} and will resume from its checkpoint"
        return Cause("requeued", what, true["Evicted"].get("message", ""), advice)
    for condition in workload.get("status", {}).get("conditions") or []:
        if condition["type"] == "QuotaReserved" and condition["status"] == "False":
            return Cause("queue", f"it waits in the queue {queue}", condition.get("message", ""), advice)
    return None


Check = Callable[[Case], "Cause | None"]
WAITS: tuple[Check, ...] = (image, config, _mount, _sandbox, _quota, _claim, _unschedulable)
