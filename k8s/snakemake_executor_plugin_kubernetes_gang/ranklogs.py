"""The logs of one gang on the volume: rank 0's whole, of every other rank the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import logs, status
from .cluster import Cluster


class RankLogs:
    """One file per rank and submission: a gang that is taken up again goes on with its own."""

    def __init__(self, cluster: Cluster, directory: Path, uid: str, show: Callable[[str], None]):
        self._cluster, self._directory, self._uid, self._show = cluster, directory, uid[:8], show
        self._lock = threading.Lock()
        self._followers: dict[str, logs.Follower] = {}  # by the pod's uid

    def stream(self, pod: status.Json) -> bool:
        """Copy a log while it grows, until `collect`; False while it has not begun."""
        if not status.container(pod).get("state", {}).keys() & {"running", "terminated"}:
            return False
        self._follower(pod).follow()
        return True

    def keep(self, pods: Iterable[status.Json]) -> None:
        """Begin to copy before the cluster takes pods away, for their logs go with them."""
        for pod in pods:
            self.stream(pod)

    def collect(self, pods: Iterable[status.Json], wait_s: float) -> bool:
        """Whether the logs of a gang that has ended are stored; ask again while they are not."""
        followers = [self._follower(pod) for pod in pods]
        first = [follower for follower in followers if follower.finish()]
        until = time.monotonic() + wait_s
        for follower in first:
            follower.join(max(0.0, until - time.monotonic()))
        return all([follower.is_done() for follower in followers])

    def stop(self, until: float) -> None:
        """Let no stream hold up Snakemake's end beyond a time of time.monotonic()."""
        for follower in list(self._followers.values()):
            follower.finish()
            follower.join(max(0.0, until - time.monotonic()))

    def tails(self, pods: Iterable[status.Json]) -> dict[int, str]:
        """Return the end of each rank's log, or what its container left as its last message."""
        found = {}
        for pod in pods:
            path, message = self._path(pod), str(status.terminated(pod).get("message", ""))
            if message and not (path.exists() and path.stat().st_size):
                path.write_text(message)
            found[status.rank(pod)] = logs.end_of(path)
        return found

    def cut(self, pods: Iterable[status.Json]) -> list[int]:
        """Return the ranks whose log may lack its end."""
        begun = [pod for pod in pods if status.terminated(pod).get("startedAt")]
        return [status.rank(pod) for pod in begun if not self._follower(pod).is_whole]

    def files(self) -> list[str]:
        """Return where the logs are; what has not begun has left none."""
        found = sorted(self._directory.glob(f"{self._uid}.rank-*.log"))
        return [str(path) for path in found if path.stat().st_size]

    def whole(self, pod: status.Json) -> bytes:
        """Return a log as the command wrote it."""
        path = self._path(pod)
        return logs.without_stamps(path.read_bytes()) if path.exists() else b""

    def _path(self, pod: status.Json) -> Path:
        return self._directory / f"{self._uid}.rank-{status.rank(pod)}.log"

    def _follower(self, pod: status.Json) -> logs.Follower:
        """The one of this pod. A mirror's thread asks for it as well as Snakemake's."""
        with self._lock:
            uid, rank = pod["metadata"]["uid"], status.rank(pod)
            if uid not in self._followers:
                show = {"show": self._show} if rank == 0 else {}
                self._followers[uid] = logs.Follower(
                    self._cluster, pod, self._path(pod), tail=rank > 0, **show
                )
            return self._followers[uid]
