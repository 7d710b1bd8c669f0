"""The logs of one gang on the volume: rank 0's complete log, and the end of every other rank's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from . import logs, status
from .cluster import Cluster
from .objects import Json


class RankLogs:
    """One file per rank and submission. A re-attached gang continues its own files."""

    def __init__(self, cluster: Cluster, directory: Path, uid: str, show: Callable[[str], None]):
        self._cluster, self._directory, self._uid, self._show = cluster, directory, uid[:8], show
        self._lock = threading.Lock()
        self._followers: dict[str, logs.Follower] = {}  # by the pod's uid

    def stream(self, pod: Json) -> bool:
        """Copy a log while it grows, until `collect`; False if the container has not started."""
        if not status.container(pod).get("state", {}).keys() & {"running", "terminated"}:
            return False
        self._follower(pod).follow()
        return True

    def save(self, pods: Iterable[Json]) -> None:
        """Start to copy logs before the cluster removes the pods, because the logs go with them."""
        for pod in pods:
            self.stream(pod)

    def collect(self, pods: Iterable[Json], wait_s: float) -> bool:
        """Whether the logs of a gang that has ended are stored; call again until they are."""
        followers = [self._follower(pod) for pod in pods]
        newly_finished = [follower for follower in followers if follower.finish()]
        until = time.monotonic() + wait_s
        for follower in newly_finished:
            follower.join(max(0.0, until - time.monotonic()))
        return all([follower.is_done() for follower in followers])

    def stop(self, until: float) -> None:
        """End all streams; wait for them until a time of time.monotonic()."""
        for follower in list(self._followers.values()):
            follower.finish()
            follower.join(max(0.0, until - time.monotonic()))

    def tails(self, pods: Iterable[Json]) -> dict[int, str]:
        """Return the end of each rank's log, or its container's termination message."""
        tails = {}
        for pod in pods:
            path, message = self._path(pod), str(status.terminated(pod).get("message", ""))
            text = logs.tail(path, self._follower(pod).unwritten)
            if message and not text:
                text = message
                with suppress(OSError):  # its follower has reported a file that cannot be written
                    path.write_text(message)
            tails[status.rank(pod)] = text
        return tails

    def incomplete(self, pods: Iterable[Json]) -> list[int]:
        """Return the ranks whose log may lack its end."""
        started = [pod for pod in pods if status.terminated(pod).get("startedAt")]
        return [status.rank(pod) for pod in started if not self._follower(pod).is_complete]

    def files(self) -> list[str]:
        """Return the paths of the logs that are not empty."""
        paths = sorted(self._directory.glob(f"{self._uid}.rank-*.log"))
        return [str(path) for path in paths if path.stat().st_size]

    def read(self, pod: Json) -> bytes:
        """Return a pod's log as its command wrote it."""
        path = self._path(pod)
        return logs.without_stamps(path.read_bytes()) if path.exists() else b""

    def _path(self, pod: Json) -> Path:
        return self._directory / f"{self._uid}.rank-{status.rank(pod)}.log"

    def _follower(self, pod: Json) -> logs.Follower:
        """The pod's follower. Both a mirror's thread and Snakemake's call this."""
        with self._lock:
            uid, rank = pod["metadata"]["uid"], status.rank(pod)
            if uid not in self._followers:
                show = {"show": self._show} if rank == 0 else {}
                self._followers[uid] = logs.Follower(
                    self._cluster, pod, self._path(pod), warn=self._show, tail=rank > 0, **show
                )
            return self._followers[uid]
