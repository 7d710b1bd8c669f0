"""Polls gangs: whether each starts, runs and ends, and if it fails, why."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import explain, jobs, state, status, waits
from .evidence import Evidence
from .gangs import FENCE_S, UNANSWERED_S, Gangs
from .objects import LABEL_GANG, Json
from .ranklogs import RankLogs
from .spec import GangSpec

REPORT_AFTER_S = 5.0
BROKEN_S = 20.0  # time for a gang's own controller to notice that a pod is gone
# Seconds after which a gang that cannot start is stopped. Until then the kubelet retries pulls and mounts.
PATIENCE_S = {"image": 300, "FailedMount": 300, "FailedCreatePodSandBox": 300, "claim": 300}
CONFIG_PATIENCE_S = 60
# Logs that are streamed at a time: each takes a connection and a thread. Other logs are read at the end.
STREAMS = 32
# Most logs are read faster. If one is not, for example from a lost node, other gangs do not wait as well.
LOG_WAIT_S = 0.5
NO_WAIT_S = 10.0
WAITS_FOR_ITS_TURN = ("unschedulable", "quota", "queue", "requeued")


@dataclass
class Watch:
    """One watched gang. Times are of time.monotonic, 0 if the event has not happened."""

    job: Any
    spec: GangSpec
    gang: Json
    logs: RankLogs
    partial_limit_s: float  # how long only some of the pods may run
    reported: str = ""  # the last reason for waiting, or "running"
    waits_since: dict[str, float] = field(default_factory=dict)  # by reason
    partial_since: float = 0.0
    broken_since: float = 0.0
    dying_since: float = 0.0
    fenced_at: float = 0.0
    stop_cause: waits.Cause | None = None
    requeued_pods: set[str] = field(default_factory=set)  # uids of pods that a queue has ended
    begin: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Verdict:
    """How a gang ended. `log` is rank 0's output; `logs` are the files with every rank's."""

    success: bool
    sentence: str = ""
    log: bytes = b""
    logs: list[str] = field(default_factory=list)
    pods: tuple[Json, ...] = ()


class Watcher:
    """Watches gangs. `say` informs the user, `show` prints a line of a gang's log."""

    def __init__(
        self, gangs: Gangs, site: jobs.Site, say: Callable[[str], None], show: Callable[[str, str], None]
    ):
        self._gangs, self._site, self._say, self._show = gangs, site, say, show
        self._watches: dict[int, Watch] = {}  # by id(job)
        self._streaming: set[int] = set()
        self._slow_until = 0.0
        self._evidence = Evidence(gangs.cluster, say)
        gangs.pods.on_change = self._pod_changed

    def begin(self, job: Any, spec: GangSpec, gang: Json) -> Watch:
        """Start to watch the gang of a job."""
        show, directory = partial(self._show, spec.name), Path(spec.state_dir)
        logs = RankLogs(self._gangs.cluster, directory, gang["metadata"]["uid"], show)
        # Random: two gangs that hold half of the cluster each must not give up and restart in step.
        watch = Watch(job, spec, gang, logs, spec.start_timeout_s * random.uniform(1.0, 1.25))
        self._watches[id(job)] = watch
        return watch

    def forget(self, job: Any) -> Json | None:
        """Stop watching a job's gang and return its object."""
        watch = self._watches.pop(id(job), None)
        self._streaming.discard(id(job))
        return watch.gang if watch else None

    def watches(self) -> list[Watch]:
        """Return all watched gangs."""
        return list(self._watches.values())

    def stop(self) -> None:
        """End all log streams, within one second in total."""
        until = time.monotonic() + 1.0
        for watch in self.watches():
            watch.logs.stop(until)

    def poll(self, watch: Watch) -> Verdict | None:
        """Return how a gang ended, None while it has not.

        Raises:
            ApiError, Unreachable: poll again later.
        """
        gang, now = self._gangs.read(watch.gang, watch.spec.nodes, watch.requeued_pods)
        self._stream(watch, now)
        if watch.stop_cause:
            return self._stop_gang(watch, gang, now, watch.stop_cause)
        if now.ended:
            return self._verdict(watch, gang, now)
        if self._gangs.is_gone(gang):
            what = f"{gang['kind']} {watch.spec.name} was deleted by somebody else"
            watch.stop_cause = waits.Cause("deleted", what, "", "start Snakemake again")
            return self._stop_gang(watch, gang, now, watch.stop_cause)
        watch.stop_cause = self._reason_to_stop(watch, gang, now)
        if watch.stop_cause:
            self._say(f"{watch.spec.name}: {watch.stop_cause.sentence()} The gang is stopped.")
            watch.logs.save(now.pods)  # stopped at the next poll, because logs go with their pods
        return None

    # -- while it runs ----------------------------------------------------------------------

    def _stream(self, watch: Watch, now: status.Status) -> None:
        job = id(watch.job)
        if job not in self._streaming and len(self._streaming) >= STREAMS:
            return
        if now.pods and status.rank(now.pods[0]) == 0 and watch.logs.stream(now.pods[0]):
            self._streaming.add(job)

    def _pod_changed(self, pod: Json) -> None:
        """Save logs at once if a pod fails: its peers may be gone a second later. In the mirror's thread."""
        if not status.is_broken(pod):
            return
        name = pod["metadata"].get("labels", {}).get(LABEL_GANG)
        for watch in self.watches():
            if watch.spec.name == name and watch.spec.nodes > 1:
                watch.logs.save(self._gangs.pods_of(watch.gang))

    def _reason_to_stop(self, watch: Watch, gang: Json, now: status.Status) -> waits.Cause | None:
        clock = time.monotonic()
        if now.phase == "queued":
            self._note_queued(watch, now)
        elif any(status.is_broken(pod) for pod in now.pods):
            watch.broken_since = watch.broken_since or clock
            is_over = clock - watch.broken_since > BROKEN_S
            return explain.explain(self._case(watch, gang, now)) if is_over else None
        watch.broken_since = 0.0
        if now.phase == "running":
            watch.partial_since = 0.0
            watch.waits_since.clear()
            self._report(watch, "running")
            return None
        if clock - watch.begin < REPORT_AFTER_S and now.phase != "starting":
            return None
        return self._start_failure(watch, gang, now, clock)

    def _note_queued(self, watch: Watch, now: status.Status) -> None:
        """A gang waits in a queue, or has been returned to it while its pods still end."""
        watch.partial_since = 0.0
        if watch.reported == "running":
            self._evidence.refresh()  # it describes the queue as it was before
        watch.requeued_pods |= {pod["metadata"]["uid"] for pod in now.pods if status.is_broken(pod)}

    def _start_failure(
        self, watch: Watch, gang: Json, now: status.Status, clock: float
    ) -> waits.Cause | None:
        """Report why a gang does not start, and return a cause once it is hopeless."""
        cause = self._wait_cause(watch, gang, now)
        if cause:
            self._report(watch, cause.reason, cause.sentence())
            since = watch.waits_since.setdefault(cause.reason, clock)
            if clock - since >= self._patience(cause.reason):
                return cause
        else:
            watch.waits_since.clear()
        if now.phase != "starting":
            return None
        watch.partial_since = watch.partial_since or clock
        if clock - watch.partial_since <= watch.partial_limit_s:
            return None
        what = f"only {now.running} of {watch.spec.nodes} pods started within {watch.partial_limit_s:.0f} s"
        evidence, advice = cause.sentence() if cause else "", "use a queue, which starts all pods or none"
        return waits.Cause("half-started", what, evidence, advice, transient=True)

    def _patience(self, reason: str) -> float:
        if reason in waits.PERMANENT:
            return 0.0
        if reason in WAITS_FOR_ITS_TURN:
            return float("inf")
        return min(PATIENCE_S.get(reason, CONFIG_PATIENCE_S), self._site.settings.start_timeout)

    def _report(self, watch: Watch, reason: str, text: str = "") -> None:
        """Report a new reason for waiting, or that a gang runs after it had to wait."""
        if watch.reported == reason:
            return
        if text:
            self._say(f"{watch.spec.name}: {text}")
        elif watch.reported:
            self._say(f"{watch.spec.name}: it is running now")
        watch.reported = reason

    def _wait_cause(self, watch: Watch, gang: Json, now: status.Status) -> waits.Cause | None:
        if now.phase != "queued":
            return waits.explain(self._case(watch, gang, now))
        workloads = self._evidence.workloads(gang["metadata"]["uid"])
        if not workloads:
            what, advice = "it is suspended, probably by a queue", "it starts when its queue admits it"
            return waits.Cause("queue", what, "", advice)
        return next(filter(None, map(waits.kueue, workloads)), None)

    def _case(
        self, watch: Watch, gang: Json, now: status.Status, tails: dict[int, str] | None = None
    ) -> waits.Case:
        spec = watch.spec
        events = self._evidence.warnings(spec.name, gang["metadata"]["creationTimestamp"])
        requested = f"{spec.nodes} x ({spec.gpus} GPUs, {spec.cpu} CPUs, {spec.memory_mb} MB)"
        return waits.Case(gang, now.pods, events, tails, requested, spec.nodes, time.time())

    # -- the end ----------------------------------------------------------------------------

    def _verdict(self, watch: Watch, gang: Json, now: status.Status) -> Verdict | None:
        """How a gang ended by itself; None until its logs are stored."""
        if not self._collect(watch, now):
            return None
        if now.phase == "succeeded":
            self._report_incomplete_logs(watch, now.pods)
            log = b"".join(watch.logs.read(pod) for pod in now.pods if status.rank(pod) == 0)
            return Verdict(True, log=log, pods=now.pods)
        self._evidence.refresh()
        tails = watch.logs.tails(now.pods)
        return self._failure(watch, now, explain.explain(self._case(watch, gang, now, tails)))

    def _collect(self, watch: Watch, now: status.Status) -> bool:
        """Whether a gang's logs are stored. After a wait in vain, other gangs are not waited for."""
        is_slow = time.monotonic() < self._slow_until
        is_stored = watch.logs.collect(now.pods, 0.0 if is_slow else LOG_WAIT_S)
        if not (is_stored or is_slow):
            self._slow_until = time.monotonic() + NO_WAIT_S
        return is_stored

    def _report_incomplete_logs(self, watch: Watch, pods: tuple[Json, ...]) -> None:
        ranks = ", ".join(map(str, watch.logs.incomplete(pods)))
        if ranks:
            self._say(
                f"{watch.spec.name}: the stored log of rank {ranks} may lack its end; the node did not return it"
            )

    def _stop_gang(self, watch: Watch, gang: Json, now: status.Status, cause: waits.Cause) -> Verdict | None:
        """Delete a gang; its verdict once none of its pods can write any more."""
        self._gangs.end(gang)
        pods = [pod for pod in self._gangs.pods_of(gang) if not self._gangs.pods.is_gone(pod)]
        live = [pod for pod in pods if not status.terminated(pod)]
        if live and not self._is_fenced(watch, live):
            return None
        for pod in live:
            self._gangs.cluster.delete(pod, grace_s=0, patient=False)
        if not self._collect(watch, now):
            return None
        watch.logs.tails(now.pods)
        return self._failure(watch, now, cause)

    def _is_fenced(self, watch: Watch, live: list[Json]) -> bool:
        """Whether pods that the cluster cannot end had a new token on the volume, and time to read it."""
        clock = time.monotonic()
        watch.dying_since = watch.dying_since or clock
        grace = max(pod["metadata"].get("deletionGracePeriodSeconds") or 0 for pod in live)
        if clock - watch.dying_since < grace + UNANSWERED_S:
            return False
        if not watch.fenced_at:
            self._say(f"{watch.spec.name}: a node does not respond; a file on the volume stops its pod")
            state.write_pod_files(jobs.superseding(watch.spec))
            watch.fenced_at = clock
        return clock - watch.fenced_at > FENCE_S

    def _failure(self, watch: Watch, now: status.Status, cause: waits.Cause) -> Verdict:
        self._report_incomplete_logs(watch, now.pods)
        retry = retry_sentence(watch.job.attempt, watch.job.restart_times + 1, cause)
        return Verdict(False, f"{cause.sentence()} {retry}", logs=watch.logs.files())


def retry_sentence(attempt: int, tries: int, cause: waits.Cause) -> str:
    """Return whether a failed job is tried again, and what to do if that could have helped."""
    if attempt < tries:
        return f"It is tried again (attempt {attempt + 1} of {tries})."
    advice = " Start Snakemake again, or raise retries." if cause.transient else ""
    return f"It is not tried again (attempt {attempt} of {tries}).{advice}"
