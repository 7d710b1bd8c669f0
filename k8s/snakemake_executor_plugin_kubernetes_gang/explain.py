"""Why a gang failed, in one sentence: pure functions of what the cluster says.

Causes are ranked by how decisive they are, not by time: when one pod is killed for its memory, its
peers end with network errors, and those are never the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from . import status, waits
from .entrypoint import CODE_NO_ADDRESS, CODE_OTHER_VOLUME, CODE_SUPERSEDED
from .waits import Case, Cause, Check, name_of

Json = Mapping[str, Any]


DISRUPTIONS = {
    "PreemptionByScheduler": ("preempted", "was preempted by pods of a higher priority", "raise the priority, or use a queue with a quota of its own"),
    "TerminationByKubelet": ("evicted", "was evicted by its node", "the node ran short of memory or disk; nothing in the rule is wrong"),
    "EvictionByEvictionAPI": ("drained", "was evicted, as when a node is drained", "nothing in the rule is wrong"),
    "DeletionByTaintManager": ("node-lost", "was on a node that does not answer any more, or was closed for it", "nothing in the rule is wrong"),
    "DeletionByPodGC": ("node-lost", "was on a node that is gone", "nothing in the rule is wrong"),
}  # fmt: skip
# Lines of a log that name a cause, most decisive first. A peer that went away is an effect of another's end.
LOG_CAUSES = (
    ("nan", r"(?i)\b(loss|grad\w*)\b.*\b(nan|inf|not finite)\b|\b(nan|inf)\b.*\b(loss|gradient)|not finite", "training gave a number that is not finite", "lower the learning rate, or train in bf16 or fp32"),
    ("gpu-memory", r"CUDA out of memory|OutOfMemoryError", "a GPU ran out of memory", "lower the micro-batch, raise the ZeRO stage, or ask for more GPUs"),
    ("xid", r"NVRM: Xid|CUDA error: (uncorrectable ECC|unspecified launch failure)|fallen off the bus", "a GPU broke down", "have the node looked at"),
    ("child-oom", r"exitcode\s*: -9|[Ss]ignal 9|SIGKILL|DataLoader worker .* killed|^Killed$", "a process in the pod was killed, as the kernel does when memory runs out", "raise mem_mb"),
    ("shm", r"[Bb]us error|unhandled system error.*shm|No space left on device.*/dev/shm", "shared memory ran out", "raise shm_mb"),
    ("timeout", r"Watchdog caught collective operation timeout|[Tt]imed out waiting \d+ms|NCCL.*[Tt]ime|DistStoreError|wait timeout", "processes waited in vain for each other", "look for the rank that stopped first, and at the network between nodes (NCCL_DEBUG=INFO)"),
)  # fmt: skip
PEER = re.compile(
    r"Connection (reset|closed) by peer|Connection refused|Broken pipe.*(gloo|nccl)|NCCL.*remote"
)
# Steps with such numbers are skipped and survived, and are told in the same words as those that end a training.
SURVIVED = ("nan",)
ERROR = re.compile(r"\s*(\[rank\d+\]:\s*)?(\w+\.)*(\w*Error|\w*Exception|error)\b")
# What launchers say of a process that has failed.
LAUNCHERS = re.compile(r"ChildFailedError|CalledProcessError")
LOG_END = 80  # lines: what stands further up was survived


def explain(case: Case) -> Cause:
    """Return the cause of a gang's failure: the most decisive that any check finds."""
    for check in CHECKS:
        cause = check(case)
        if cause:
            return cause
    return _unknown(case)


def _disrupted(case: Case) -> Cause | None:
    for pod in case.pods:
        found = status.conditions(pod).get("DisruptionTarget")
        if found and found.get("reason") in DISRUPTIONS:
            reason, what, advice = DISRUPTIONS[found["reason"]]
            if pod.get("status", {}).get("reason") == "Evicted":
                break  # the kubelet's own text says more
            return Cause(reason, f"{name_of(pod)} {what}", found.get("message", ""), advice, transient=True)
    for pod in case.pods:
        reason, text = pod.get("status", {}).get("reason"), pod.get("status", {}).get("message", "")
        if reason == "Evicted":
            return Cause(
                "evicted",
                f"{name_of(pod)} was evicted by its node",
                text,
                "the node ran short, or the pod used more than it asked for: look at which",
                transient=True,
            )
        if reason in ("NodeLost", "NodeShutdown", "Terminated", "Shutdown"):
            return Cause(
                "node-lost",
                f"{name_of(pod)} went with its node",
                text,
                "nothing in the rule is wrong",
                transient=True,
            )
    return None


def _deadline(case: Case) -> Cause | None:
    late = [p for p in case.pods if p.get("status", {}).get("reason") == "DeadlineExceeded"]
    job = status.conditions(case.gang).get("Failed", {})
    if not late and job.get("reason") != "DeadlineExceeded":
        return None
    evidence = late[0]["status"].get("message", "") if late else job.get("message", "")
    return Cause(
        "deadline",
        "the gang ran longer than its resource runtime allows",
        evidence,
        "raise runtime; a training goes on from its last checkpoint",
    )


def _admission(case: Case) -> Cause | None:
    for pod in case.pods:
        reason, text = pod.get("status", {}).get("reason", ""), pod.get("status", {}).get("message", "")
        if reason == "UnexpectedAdmissionError" or reason.startswith("OutOf"):
            return Cause(
                "admission",
                f"the node refused {name_of(pod)}",
                f"{reason}: {text}",
                "the node has less than it told the scheduler, often a GPU that broke; have it looked at",
                transient=True,
            )
    return None


def _oom(case: Case) -> Cause | None:
    for pod in case.pods:
        end = status.terminated(pod)
        if end.get("reason") == "OOMKilled":
            limit = _limit(pod)
            return Cause(
                "oom",
                f"{name_of(pod)} was killed because it used more memory than its limit of {limit}",
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


def _entrypoint(case: Case) -> Cause | None:
    advice = {
        CODE_OTHER_VOLUME: ("volume", "mount what the controller uses, at the same path"),
        CODE_NO_ADDRESS: (
            "no-address",
            "rank 0 did not start, or the cluster's DNS does not serve headless Services",
        ),
        CODE_SUPERSEDED: ("superseded", "another controller has started the same gang"),
    }
    for pod in case.pods:
        end = status.terminated(pod)
        if end.get("exitCode") in advice:
            reason, what = advice[end["exitCode"]]
            return Cause(
                reason,
                f"{name_of(pod)} ended before its command did",
                _last_line(end.get("message", "")),
                what,
            )
    return None


def _log_line(case: Case) -> Cause | None:
    """A line that names a cause, in any rank's log."""
    for reason, pattern, what, advice in LOG_CAUSES:
        for pod in case.pods:
            end = status.terminated(pod)
            if end and not end.get("exitCode"):
                continue
            for line in _from_the_end(_tail(case, pod), until_error=reason in SURVIVED):
                if re.search(pattern, line):
                    code = f"exit code {end['exitCode']}" if end else "still running"
                    return Cause(reason, f"{what} in {name_of(pod)}, {code}", line, advice)
    return None


def _from_the_end(lines: list[str], *, until_error: bool) -> Iterator[str]:
    """Lines from the last one on; `until_error`: up to the first that names an error."""
    for line in reversed(lines):
        yield line
        if until_error and ERROR.match(line) and not LAUNCHERS.search(line):
            return


def _tail(case: Case, pod: Json) -> list[str]:
    text = (case.tails or {}).get(status.rank(pod)) or status.terminated(pod).get("message", "")
    return text.splitlines()[-LOG_END:]


def _exit_code(case: Case) -> Cause | None:
    ended = [(status.terminated(p), p, _tail(case, p)) for p in case.pods]
    failed = [(end, pod, tail) for end, pod, tail in ended if end.get("exitCode")]
    if not failed:
        return None

    def is_effect(end: Json, tail: list[str]) -> bool:
        return end["exitCode"] == 143 or any(PEER.search(line) for line in tail)

    # The first to end is the cause; the others were told to end, or lost it.
    end, pod, tail = min(failed, key=lambda one: (is_effect(one[0], one[2]), one[0].get("finishedAt", "")))
    peer = next((line for line in reversed(tail) if PEER.search(line)), "")
    if peer:
        return Cause(
            "peer", f"a process in {name_of(pod)} lost its peer", peer, "look at the other ranks' logs"
        )
    signal = {137: " (SIGKILL)", 143: " (SIGTERM)", 139: " (SIGSEGV)"}.get(end["exitCode"], "")
    what = f"{name_of(pod)} ended with exit code {end['exitCode']}{signal}"
    return Cause("exit-code", what, _last_line("\n".join(tail)), "its log says more")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    told = [line for line in errors if not LAUNCHERS.search(line)]
    return (told or errors or lines or [""])[-1]


def _deleted(case: Case) -> Cause | None:
    """Pods that were told to end by somebody, not because one of them had failed."""
    taken = [pod for pod in case.pods if "deletionTimestamp" in pod["metadata"]]
    failed = [pod for pod in case.pods if status.terminated(pod).get("exitCode")]
    if not taken or any(pod not in taken for pod in failed):
        return None
    first = min(taken, key=lambda pod: str(pod["metadata"]["deletionTimestamp"]))
    return Cause(
        "deleted",
        f"{name_of(first)} was deleted while it ran",
        "",
        "ask who did; nothing in the rule is wrong",
        transient=True,
    )


def _unknown(case: Case) -> Cause:
    found = status.conditions(case.gang).get("Failed", {})
    evidence = " ".join(filter(None, (found.get("reason"), found.get("message"))))
    return Cause(
        "unknown",
        f"{case.gang['kind']} {case.gang['metadata']['name']} failed and none of its pods says why",
        evidence,
        "a pod may have been deleted; the rule's log says more",
    )


# A pod that cannot start never gets to the causes below it.
CHECKS: tuple[Check, ...] = (
    _disrupted, _deadline, _admission, _oom, _entrypoint, _deleted, _log_line, _exit_code, waits.image, waits.config,
)  # fmt: skip
