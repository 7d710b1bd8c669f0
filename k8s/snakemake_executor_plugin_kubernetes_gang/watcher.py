"""One look at a gang after another: does it start, run, end, and if not, why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import explain, jobs, logs, status, waits
from .gangs import FENCE_S, UNANSWERED_S, Gangs, write_state
from .news import News
from .spec import GangSpec

Json = dict[str, Any]

SAY_AFTER_S = 5.0
BROKEN_S = 20.0  # for a gang's own controller to notice that a pod is gone
# Seconds after which what does not start will not: pulls and mounts are tried again by the kubelet.
PATIENCE_S = {"image": 300, "FailedMount": 300, "FailedCreatePodSandBox": 300}
CONFIG_PATIENCE_S = 60
# Logs that stream at a time: each is a connection and a thread. Of other gangs the log comes at the end.
STREAMS = 32
WAITS_FOR_ITS_TURN = ("unschedulable", "quota", "queue")


@dataclass
class Watch:
    """One gang under observation. Times are of time.monotonic."""

    job: Any
    spec: GangSpec
    gang: Json
    follower: logs.Follower | None = None
    said: str = ""
    waits_since: dict[str, float] = field(default_factory=dict)
    half_since: float = 0.0
    broken_since: float = 0.0
    dying_since: float = 0.0
    fenced_at: float = 0.0
    ending: waits.Cause | None = None
    begun: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Verdict:
    """A gang's end. `log` is rank 0's output; `logs` are the files with every rank's."""

    success: bool
    sentence: str = ""
    log: bytes = b""
    logs: list[str] = field(default_factory=list)
    pods: tuple[status.Json, ...] = ()


class Watcher:
    def __init__(
        self, gangs: Gangs, site: jobs.Site, say: Callable[[str], None], show: Callable[[str, str], None]
    ):
        self._gangs, self._site, self._say, self._show = gangs, site, say, show
        self._watches: dict[int, Watch] = {}  # by the job's identity
        self._streaming: set[int] = set()
        self._news = News(gangs.cluster, say)

    def begin(self, job: Any, spec: GangSpec, gang: Json) -> Watch:
        watch = Watch(job, spec, gang)
        self._watches[id(job)] = watch
        return watch

    def forget(self, job: Any) -> Json | None:
        """Stop watching a job's gang and return its object."""
        watch = self._watches.pop(id(job), None)
        self._streaming.discard(id(job))
        return watch.gang if watch else None

    def watches(self) -> list[Watch]:
        """Return all gangs under observation."""
        return list(self._watches.values())

    def stop(self) -> None:
        """Let no log stream hold up Snakemake's end: all together have a second."""
        until = time.monotonic() + 1.0
        for watch in self.watches():
            if watch.follower:
                watch.follower.end(timeout_s=max(0.0, until - time.monotonic()))

    def look(self, watch: Watch) -> Verdict | None:
        """Return how a gang has ended, None while it has not.

        Raises:
            ApiError, Unreachable: look again later.
        """
        gang, now = self._gangs.read(watch.gang, watch.spec.nodes)
        self._follow(watch, now)
        if watch.ending:
            return self._end(watch, gang, now, watch.ending)
        if now.phase == "succeeded":
            return self._succeed(watch, now)
        if now.phase == "failed":
            return self._fail(watch, gang, now)
        if self._gangs.is_gone(gang):
            lost = waits.Cause(
                "deleted",
                f"{gang['kind']} {watch.spec.name} was deleted by somebody else",
                "",
                "start Snakemake again",
            )
            return self._end(watch, gang, now, lost)
        cause = self._cannot_go_on(watch, gang, now)
        if cause:
            watch.ending = cause
            self._say(f"{watch.spec.name}: {cause.sentence()} The gang is stopped.")
            return self._end(watch, gang, now, cause)
        return None

    # -- while it runs ----------------------------------------------------------------------

    def _follow(self, watch: Watch, now: status.Status) -> None:
        if watch.follower or len(self._streaming) >= STREAMS:
            return
        if not now.pods or status.rank(now.pods[0]) != 0:
            return
        if "running" in status.container(now.pods[0]).get("state", {}):
            self._streaming.add(id(watch.job))
            watch.follower = self._follower(watch, now.pods[0])
            watch.follower.start()

    def _follower(self, watch: Watch, pod: status.Json) -> logs.Follower:
        name, path = watch.spec.name, self._log_path(watch, 0)
        return logs.Follower(self._gangs.cluster, pod, path, lambda line: self._show(name, line))

    def _log_path(self, watch: Watch, rank: int) -> Path:
        """One file per rank and submission: a gang that is taken up again goes on with its own."""
        return Path(watch.spec.state_dir, f"{watch.gang['metadata']['uid'][:8]}.rank-{rank}.log")

    def _cannot_go_on(self, watch: Watch, gang: Json, now: status.Status) -> waits.Cause | None:
        clock = time.monotonic()
        if any(status.is_broken(pod) for pod in now.pods):
            watch.broken_since = watch.broken_since or clock
            if clock - watch.broken_since > BROKEN_S:
                return explain.explain(self._case(watch, gang, now))
            return None
        watch.broken_since = 0.0
        if now.phase == "running":
            watch.half_since = 0.0
            self._say_once(watch, "running")
            return None
        return self._does_not_start(watch, gang, now, clock)

    def _does_not_start(
        self, watch: Watch, gang: Json, now: status.Status, clock: float
    ) -> waits.Cause | None:
        if clock - watch.begun < SAY_AFTER_S and now.phase != "starting":
            return None
        cause = self._waits(watch, gang, now)
        if cause:
            self._say_once(watch, cause.reason, cause.sentence())
            since = watch.waits_since.setdefault(cause.reason, clock)
            if clock - since >= self._patience(cause.reason):
                return cause
        if now.phase == "starting":
            watch.half_since = watch.half_since or clock
            if clock - watch.half_since > watch.spec.start_timeout_s:
                text = f"only {now.running} of {watch.spec.nodes} pods started within {watch.spec.start_timeout_s} s"
                return waits.Cause(
                    "half-started",
                    text,
                    cause.sentence() if cause else "",
                    "a queue starts all or none",
                    transient=True,
                )
        return None

    def _patience(self, reason: str) -> float:
        if reason in waits.AT_ONCE:
            return 0.0
        if reason in WAITS_FOR_ITS_TURN:
            return float("inf")
        return min(PATIENCE_S.get(reason, CONFIG_PATIENCE_S), self._site.settings.start_timeout)

    def _say_once(self, watch: Watch, reason: str, text: str = "") -> None:
        if watch.said != reason:
            if text:
                self._say(f"{watch.spec.name}: {text}")
            elif watch.said:
                self._say(f"{watch.spec.name}: it runs now")
            watch.said = reason

    def _waits(self, watch: Watch, gang: Json, now: status.Status) -> waits.Cause | None:
        if now.phase == "queued":
            return self._queued(gang)
        return waits.why(self._case(watch, gang, now))

    def _queued(self, gang: Json) -> waits.Cause | None:
        mine = self._news.workloads(gang["metadata"]["uid"])
        if not mine:
            return waits.Cause(
                "queue", "it is suspended, as by a queue", "", "it starts when its queue lets it"
            )
        return next(filter(None, map(waits.kueue, mine)), None)

    def _case(
        self, watch: Watch, gang: Json, now: status.Status, tails: dict[int, str] | None = None
    ) -> waits.Case:
        spec = watch.spec
        events = self._news.warnings(spec.name, gang["metadata"]["creationTimestamp"])
        asked = f"{spec.nodes} x ({spec.gpus} GPUs, {spec.cpu} CPUs, {spec.memory_mb} MB)"
        return waits.Case(gang, now.pods, events, tails, asked)

    # -- the end ----------------------------------------------------------------------------

    def _succeed(self, watch: Watch, now: status.Status) -> Verdict:
        self._collect(watch, now)
        return Verdict(True, log=self._rank0(watch), pods=now.pods)

    def _fail(self, watch: Watch, gang: Json, now: status.Status) -> Verdict:
        tails = self._collect(watch, now)
        self._news.refresh()
        return self._failure(watch, explain.explain(self._case(watch, gang, now, tails)))

    def _end(self, watch: Watch, gang: Json, now: status.Status, cause: waits.Cause) -> Verdict | None:
        """A gang that was deleted has ended when none of its pods can write any more."""
        self._gangs.end(gang)
        live = [
            p
            for p in self._gangs.pods_of(gang)
            if not self._gangs.pods.is_gone(p) and not status.terminated(p)
        ]
        if live and not self._is_fenced(watch, live):
            return None
        for pod in live:
            self._gangs.cluster.delete(pod, grace_s=0, patient=False)
        self._collect(watch, now)
        return self._failure(watch, cause)

    def _is_fenced(self, watch: Watch, live: list[Json]) -> bool:
        """Whether pods that the cluster cannot end have been told to, and have had the time."""
        clock = time.monotonic()
        watch.dying_since = watch.dying_since or clock
        grace = max(pod["metadata"].get("deletionGracePeriodSeconds") or 0 for pod in live)
        if clock - watch.dying_since < grace + UNANSWERED_S:
            return False
        if not watch.fenced_at:
            self._say(
                f"{watch.spec.name}: a node does not answer; its pod is told through the volume to stop"
            )
            write_state(jobs.superseding(watch.spec))
            watch.fenced_at = clock
        return clock - watch.fenced_at > FENCE_S

    def _failure(self, watch: Watch, cause: waits.Cause) -> Verdict:
        attempt, tries = watch.job.attempt, watch.job.restart_times + 1
        again = f" It is tried again (attempt {attempt + 1} of {tries})." if attempt < tries else ""
        return Verdict(False, f"{cause.sentence()}{again}", logs=[str(p) for p in self._stored(watch)])

    def _collect(self, watch: Watch, now: status.Status) -> dict[int, str]:
        """Store the end of every rank's log; rank 0's whole, by its follower."""
        if watch.follower:
            watch.follower.end()
        tails = {}
        for pod in now.pods:
            rank = status.rank(pod)
            tails[rank] = self._whole(watch, pod) if rank == 0 else logs.tail(self._gangs.cluster, pod)
            if rank:
                self._log_path(watch, rank).write_text(tails[rank])
        return tails

    def _whole(self, watch: Watch, pod: status.Json) -> str:
        """Store rank 0's log, where it has not been streamed, and return its end."""
        if not watch.follower:
            self._follower(watch, pod).end()
        return logs.end_of(self._log_path(watch, 0)) or str(status.terminated(pod).get("message", ""))

    def _stored(self, watch: Watch) -> list[Path]:
        uid = watch.gang["metadata"]["uid"][:8]
        return sorted(Path(watch.spec.state_dir).glob(f"{uid}.rank-*.log"))

    def _rank0(self, watch: Watch) -> bytes:
        path = self._log_path(watch, 0)
        return logs.without_stamps(path.read_bytes()) if path.exists() else b""
