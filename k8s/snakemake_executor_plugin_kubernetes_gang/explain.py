"""Why a gang failed, in one sentence: pure functions of what the cluster reports.

Causes are ranked by how decisive they are, not by time: when one pod is killed for its memory, its
peers end with network errors, which are never the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import status, waits
from .entrypoint import CODE_NO_ADDRESS, CODE_OTHER_VOLUME, CODE_SUPERSEDED
from .objects import Json
from .waits import Case, Cause, Check, name_of

NOTHING_WRONG = "nothing in the rule is wrong"
# Reason of the condition DisruptionTarget: our reason, what happened, what to do.
DISRUPTIONS = {
    "PreemptionByScheduler": (
        "preempted",
        "was preempted by pods of a higher priority",
        "raise the priority, or use a queue with a quota of its own",
    ),
    "TerminationByKubelet": (
        "evicted",
        "was evicted by its node",
        f"the node ran short of memory or disk; {NOTHING_WRONG}",
    ),
    "EvictionByEvictionAPI": ("drained", "was evicted, as when a node is drained", NOTHING_WRONG),
    "DeletionByTaintManager": (
        "node-lost",
        "was on a node that no longer responds, or that a taint has closed",
        NOTHING_WRONG,
    ),
    "DeletionByPodGC": ("node-lost", "was on a node that no longer exists", NOTHING_WRONG),
}
# Patterns in a log, most decisive first: our reason, the pattern, what happened, what to do. A lost peer is
# not among them: it is the effect of another pod's end.
LOG_CAUSES = (
    (
        "nan",
        r"(?i)\b(loss|grad\w*)\b.*\b(nan|inf|not finite)\b|\b(nan|inf)\b.*\b(loss|gradient)|not finite",
        "training produced a number that is not finite",
        "lower the learning rate, or train in bf16 or fp32",
    ),
    (
        "gpu-memory",
        r"CUDA out of memory|OutOfMemoryError",
        "a GPU ran out of memory",
        "lower the micro-batch, raise the ZeRO stage, or request more GPUs",
    ),
    (
        "xid",
        r"NVRM: Xid|CUDA error: (uncorrectable ECC|unspecified launch failure)|fallen off the bus",
        "a GPU failed",
        "have the node checked",
    ),
    (
        "child-oom",
        r"exitcode\s*: -9|[Ss]ignal 9|SIGKILL|DataLoader worker .* killed|^Killed$",
        "a process was killed, probably because memory ran out",
        "raise mem_mb",
    ),
    (
        "shm",
        r"[Bb]us error|unhandled system error.*shm|No space left on device.*/dev/shm",
        "shared memory ran out",
        "raise shm_mb",
    ),
    (
        "timeout",
        r"Watchdog caught collective operation timeout|[Tt]imed out waiting \d+ms|NCCL.*[Tt]ime|DistStoreError|wait timeout",
        "processes timed out while waiting for each other",
        "find the rank that stopped first, and check the network between nodes (NCCL_DEBUG=INFO)",
    ),
)
PEER = re.compile(
    r"Connection (reset|closed) by peer|Connection refused|Broken pipe.*(gloo|nccl)|NCCL.*remote"
)
# A training skips steps with such numbers and continues; it logs them in the same words as a fatal one.
SURVIVABLE = ("nan",)
ERROR = re.compile(r"\s*(\[rank\d+\]:\s*)?(\w+\.)*(\w*Error|\w*Exception|error)\b")
# How launchers report a process that has failed.
LAUNCHERS = re.compile(r"ChildFailedError|CalledProcessError")
TAIL_LINES = 80  # the program survived what it logged before these


def explain(case: Case) -> Cause:
    """Return the cause of a gang's failure: the most decisive one."""
    for check in CHECKS:
        cause = check(case)
        if cause:
            return cause
    return _unknown(case)


def _disrupted(case: Case) -> Cause | None:
    """A pod that the cluster ended on purpose, by the pod's condition or, if that says less, its reason."""
    for pod in case.pods:
        condition = status.conditions(pod).get("DisruptionTarget", {})
        if condition.get("reason") in DISRUPTIONS:
            if pod.get("status", {}).get("reason") == "Evicted":
                break  # the kubelet's message has more detail
            reason, what, advice = DISRUPTIONS[condition["reason"]]
            return Cause(
                reason, f"{name_of(pod)} {what}", condition.get("message", ""), advice, transient=True
            )
    return next(filter(None, map(_ended_by_node, case.pods)), None)


def _ended_by_node(pod: Json) -> Cause | None:
    reason, text = pod.get("status", {}).get("reason"), pod.get("status", {}).get("message", "")
    if reason == "Evicted":
        advice = "check whether the node ran short, or the pod used more than it requested"
        return Cause("evicted", f"{name_of(pod)} was evicted by its node", text, advice, transient=True)
    if reason in ("NodeLost", "NodeShutdown", "Terminated", "Shutdown"):
        return Cause(
            "node-lost", f"{name_of(pod)} was lost with its node", text, NOTHING_WRONG, transient=True
        )
    return None


def _deadline(case: Case) -> Cause | None:
    late = [p for p in case.pods if p.get("status", {}).get("reason") == "DeadlineExceeded"]
    job = status.conditions(case.gang).get("Failed", {})
    if not late and job.get("reason") != "DeadlineExceeded":
        return None
    return Cause(
        "deadline",
        "the gang ran longer than its resource runtime allows",
        late[0]["status"].get("message", "") if late else job.get("message", ""),
        "raise runtime; a training resumes from its last checkpoint",
    )


def _admission(case: Case) -> Cause | None:
    for pod in case.pods:
        reason, text = pod.get("status", {}).get("reason", ""), pod.get("status", {}).get("message", "")
        if reason == "UnexpectedAdmissionError" or reason.startswith("OutOf"):
            return Cause(
                "admission",
                f"the node refused {name_of(pod)}",
                f"{reason}: {text}",
                "the node has less than it reported to the scheduler, often because a GPU failed; have it checked",
                transient=True,
            )
    return None


def _oom(case: Case) -> Cause | None:
    for pod in case.pods:
        end = status.terminated(pod)
        if end.get("reason") == "OOMKilled":
            return Cause(
                "oom",
                f"{name_of(pod)} was killed because it used more memory than its limit of {_limit(pod)}",
                f"OOMKilled, exit code {end.get('exitCode')}",
                "raise mem_mb, or lower what the rule keeps in memory",
            )
    return None


def _limit(pod: Json) -> str:
    for container in pod["spec"]["containers"]:
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if limit:
            return str(limit)
    return "?"


# Exit codes of the entrypoint: our reason, what to do.
ENTRYPOINT_CODES = {
    CODE_OTHER_VOLUME: ("volume", "mount the controller's volume at the same path"),
    CODE_NO_ADDRESS: (
        "no-address",
        "check that rank 0 started, and that the cluster's DNS serves headless Services",
    ),
    CODE_SUPERSEDED: ("superseded", "run one controller: another has started the same gang"),
}


def _entrypoint(case: Case) -> Cause | None:
    for pod in case.pods:
        end = status.terminated(pod)
        if end.get("exitCode") in ENTRYPOINT_CODES:
            reason, advice = ENTRYPOINT_CODES[end["exitCode"]]
            what = f"{name_of(pod)} stopped before its command was done"
            return Cause(reason, what, _last_error(end.get("message", "")), advice)
    return None


def _log_line(case: Case) -> Cause | None:
    """A line that names a cause, in any rank's log."""
    for reason, pattern, what, advice in LOG_CAUSES:
        for pod in case.pods:
            end = status.terminated(pod)
            if end and not end.get("exitCode"):
                continue
            for line in _backwards(_tail(case, pod), until_error=reason in SURVIVABLE):
                if re.search(pattern, line):
                    code = f"exit code {end['exitCode']}" if end else "still running"
                    return Cause(reason, f"{what} in {name_of(pod)}, {code}", line, advice)
    return None


def _backwards(lines: list[str], *, until_error: bool) -> Iterator[str]:
    """Lines from the last to the first; with `until_error`, to the first that names an error."""
    for line in reversed(lines):
        yield line
        if until_error and ERROR.match(line) and not LAUNCHERS.search(line):
            return


def _tail(case: Case, pod: Json) -> list[str]:
    text = (case.tails or {}).get(status.rank(pod)) or status.terminated(pod).get("message", "")
    return text.splitlines()[-TAIL_LINES:]


def _exit_code(case: Case) -> Cause | None:
    ended = [(status.terminated(pod), pod, _tail(case, pod)) for pod in case.pods]
    failed = [(end, pod, tail) for end, pod, tail in ended if end.get("exitCode")]
    if not failed:
        return None

    def is_effect(end: Json, tail: list[str]) -> bool:
        return end["exitCode"] == 143 or any(PEER.search(line) for line in tail)

    # The first pod to end is the cause; the others were terminated, or lost their peer.
    end, pod, tail = min(failed, key=lambda one: (is_effect(one[0], one[2]), one[0].get("finishedAt", "")))
    peer = next((line for line in reversed(tail) if PEER.search(line)), "")
    if peer:
        what = f"a process in {name_of(pod)} lost its peer"
        return Cause("peer", what, peer, "check the other ranks' logs")
    signal = {137: " (SIGKILL)", 143: " (SIGTERM)", 139: " (SIGSEGV)"}.get(end["exitCode"], "")
    what = f"{name_of(pod)} ended with exit code {end['exitCode']}{signal}"
    return Cause("exit-code", what, _last_error("\n".join(tail)), "see its log")


def _last_error(text: str) -> str:
    """The last line that names an error, preferably the program's own; else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    own = [line for line in errors if not LAUNCHERS.search(line)]
    return (own or errors or lines or [""])[-1]


def _deleted(case: Case) -> Cause | None:
    """Pods that somebody deleted, not the gang's controller after another pod had failed."""
    deleted = [pod for pod in case.pods if "deletionTimestamp" in pod["metadata"]]
    failed = [pod for pod in case.pods if status.terminated(pod).get("exitCode")]
    if not deleted or any(pod not in deleted for pod in failed):
        return None
    first = min(deleted, key=lambda pod: str(pod["metadata"]["deletionTimestamp"]))
    what = f"{name_of(first)} was deleted while it ran"
    return Cause("deleted", what, "", f"ask who deleted it; {NOTHING_WRONG}", transient=True)


def _unknown(case: Case) -> Cause:
    condition = status.conditions(case.gang).get("Failed", {})
    return Cause(
        "unknown",
        f"{case.gang['kind']} {case.gang['metadata']['name']} failed and none of its pods shows why",
        " ".join(filter(None, (condition.get("reason"), condition.get("message")))),
        "see the rule's log; a pod may have been deleted",
    )


# Most decisive first. The last two are about pods that could not start.
CHECKS: tuple[Check, ...] = (
    _disrupted,
    _deadline,
    _admission,
    _oom,
    _entrypoint,
    _deleted,
    _log_line,
    _exit_code,
    waits.image,
    waits.config,
)
