"""One look at a gang after another: does it start, run, end, and if not, why."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import explain, jobs, manifest, status, waits
from .gangs import FENCE_S, UNANSWERED_S, Gangs, write_state
from .news import News
from .ranklogs import RankLogs
from .spec import GangSpec

Json = dict[str, Any]

SAY_AFTER_S = 5.0
BROKEN_S = 20.0  # for a gang's own controller to notice that a pod is gone
# Seconds after which what does not start will not: pulls and mounts are tried again by the kubelet.
PATIENCE_S = {"image": 300, "FailedMount": 300, "FailedCreatePodSandBox": 300, "claim": 300}
CONFIG_PATIENCE_S = 60
# Logs that stream at a time: each is a connection and a thread. Of other gangs the log comes at the end.
STREAMS = 32
# Most logs are read in less. Where they are not, as from a node that is lost, others are not held up for them.
LOG_WAIT_S = 0.5
NO_WAIT_S = 10.0
WAITS_FOR_ITS_TURN = ("unschedulable", "quota", "queue", "queue-again")


@dataclass
class Watch:
    """One gang under observation. Times are of time.monotonic."""

    job: Any
    spec: GangSpec
    gang: Json
    logs: RankLogs
    half_limit_s: float
    said: str = ""
    waits_since: dict[str, float] = field(default_factory=dict)
    half_since: float = 0.0
    broken_since: float = 0.0
    dying_since: float = 0.0
    fenced_at: float = 0.0
    ending: waits.Cause | None = None
    taken_back: set[str] = field(default_factory=set)  # uids of pods that a queue has ended
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
        self._slow_until = 0.0
        self._news = News(gangs.cluster, say)
        gangs.pods.changed = self._pod_changed

    def begin(self, job: Any, spec: GangSpec, gang: Json) -> Watch:
        show, directory = partial(self._show, spec.name), Path(spec.state_dir)
        logs = RankLogs(self._gangs.cluster, directory, gang["metadata"]["uid"], show)
        # Two gangs that hold half of the cluster each must not give up, and begin again, in step.
        watch = Watch(job, spec, gang, logs, spec.start_timeout_s * random.uniform(1.0, 1.25))
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
            watch.logs.stop(until)

    def look(self, watch: Watch) -> Verdict | None:
        """Return how a gang has ended, None while it has not.

        Raises:
            ApiError, Unreachable: look again later.
        """
        gang, now = self._gangs.read(watch.gang, watch.spec.nodes, watch.taken_back)
        self._stream(watch, now)
        if watch.ending:
            return self._stop(watch, gang, now, watch.ending)
        if now.ended:
            return self._end(watch, gang, now)
        if self._gangs.is_gone(gang):
            watch.ending = waits.Cause(
                "deleted",
                f"{gang['kind']} {watch.spec.name} was deleted by somebody else",
                "",
                "start Snakemake again",
            )
            return self._stop(watch, gang, now, watch.ending)
        cause = self._cannot_go_on(watch, gang, now)
        if cause:
            watch.ending = cause
            self._say(f"{watch.spec.name}: {cause.sentence()} The gang is stopped.")
            watch.logs.keep(now.pods)  # and stopped at the next look: a log goes with its pod
        return None

    # -- while it runs ----------------------------------------------------------------------

    def _stream(self, watch: Watch, now: status.Status) -> None:
        job = id(watch.job)
        if job not in self._streaming and len(self._streaming) >= STREAMS:
            return
        if now.pods and status.rank(now.pods[0]) == 0 and watch.logs.stream(now.pods[0]):
            self._streaming.add(job)

    def _pod_changed(self, pod: Json) -> None:
        """In the mirror's thread: when one pod fails, its peers and their logs may be gone a second later."""
        if not status.is_broken(pod):
            return
        name = pod["metadata"].get("labels", {}).get(manifest.LABEL_GANG)
        for watch in self.watches():
            if watch.spec.name == name and watch.spec.nodes > 1:
                watch.logs.keep(self._gangs.pods_of(watch.gang))

    def _cannot_go_on(self, watch: Watch, gang: Json, now: status.Status) -> waits.Cause | None:
        clock = time.monotonic()
        if now.phase == "queued":
            watch.half_since = watch.broken_since = 0.0
            if watch.said == "running":
                self._news.refresh()  # what is known of the queue is older
            watch.taken_back |= {p["metadata"]["uid"] for p in now.pods if status.is_broken(p)}
        elif any(status.is_broken(pod) for pod in now.pods):
            watch.broken_since = watch.broken_since or clock
            if clock - watch.broken_since > BROKEN_S:
                return explain.explain(self._case(watch, gang, now))
            return None
        watch.broken_since = 0.0
        if now.phase == "running":
            watch.half_since = 0.0
            watch.waits_since.clear()
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
        else:
            watch.waits_since.clear()
        if now.phase == "starting":
            watch.half_since = watch.half_since or clock
            if clock - watch.half_since > watch.half_limit_s:
                text = (
                    f"only {now.running} of {watch.spec.nodes} pods started within {watch.half_limit_s:.0f} s"
                )
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
        return waits.Case(gang, now.pods, events, tails, asked, spec.nodes, time.time())

    # -- the end ----------------------------------------------------------------------------

    def _end(self, watch: Watch, gang: Json, now: status.Status) -> Verdict | None:
        """How a gang that has ended by itself did, once its logs are stored."""
        if not self._collect(watch, now):
            return None
        if now.phase == "succeeded":
            self._say_what_is_cut(watch, now.pods)
            log = b"".join(watch.logs.whole(pod) for pod in now.pods if status.rank(pod) == 0)
            return Verdict(True, log=log, pods=now.pods)
        self._news.refresh()
        tails = watch.logs.tails(now.pods)
        cause = explain.explain(self._case(watch, gang, now, tails))
        return self._failure(watch, now, cause)

    def _collect(self, watch: Watch, now: status.Status) -> bool:
        """Whether a gang's logs are stored. One that made us wait in vain costs others their wait."""
        is_slow = time.monotonic() < self._slow_until
        is_stored = watch.logs.collect(now.pods, 0.0 if is_slow else LOG_WAIT_S)
        if not (is_stored or is_slow):
            self._slow_until = time.monotonic() + NO_WAIT_S
        return is_stored

    def _say_what_is_cut(self, watch: Watch, pods: tuple[status.Json, ...]) -> None:
        cut = watch.logs.cut(pods)
        if cut:
            ranks = ", ".join(map(str, cut))
            self._say(
                f"{watch.spec.name}: the stored log of rank {ranks} may lack its end; the node did not give it"
            )

    def _stop(self, watch: Watch, gang: Json, now: status.Status, cause: waits.Cause) -> Verdict | None:
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
        if not self._collect(watch, now):
            return None
        watch.logs.tails(now.pods)
        return self._failure(watch, now, cause)

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

    def _failure(self, watch: Watch, now: status.Status, cause: waits.Cause) -> Verdict:
        self._say_what_is_cut(watch, now.pods)
        sentence = f"{cause.sentence()} {again(watch.job.attempt, watch.job.restart_times + 1, cause)}"
        return Verdict(False, sentence, logs=watch.logs.files())


def again(attempt: int, tries: int, cause: waits.Cause) -> str:
    """Whether a failure is tried again, and what to do where it would have helped."""
    if attempt < tries:
        return f"It is tried again (attempt {attempt + 1} of {tries})."
    advice = " Start Snakemake again, or raise retries." if cause.transient else ""
    return f"It is not tried again (attempt {attempt} of {tries}).{advice}"
