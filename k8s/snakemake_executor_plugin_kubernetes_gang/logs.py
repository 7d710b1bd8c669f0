"""Logs of pods: rank 0's streams to the terminal and to a file, every rank's end is kept.

A file keeps the kubelet's timestamps. They are what a reader needs to go on where it stopped, after a
lost connection as after a restart of the controller.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import status
from .cluster import CONNECTION_ERRORS, ApiError, Cluster, Unreachable

TAIL_LINES = 200
AGAIN_S = 5.0  # after a stream that ended well: most often the container has, too
LAST_TRIES = 3
LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)) ?(.*)$", re.DOTALL)


class Position:
    """How far a log has been read: the last timestamp, and how many lines had it."""

    def __init__(self, stamp: str = "", count: int = 0):
        self.stamp, self.count = stamp, count
        self._again = 0

    def rewind(self) -> dict[str, str]:
        """Prepare for a stream that starts again; return the query that asks for it."""
        self._again = 0
        # The API cuts sinceTime to seconds, so lines of the last second come again.
        return {"sinceTime": self.stamp} if self.stamp else {}

    def is_new(self, stamp: str) -> bool:
        """Whether a line with this timestamp has not been read; lines come in order."""
        if stamp < self.stamp:
            return False
        if stamp > self.stamp:
            self.stamp, self.count, self._again = stamp, 1, 1
            return True
        self._again += 1
        if self._again <= self.count:
            return False
        self.count = self._again
        return True


def resume(path: Path) -> Position:
    """Return where a log's file ends; half a line at its end is cut off."""
    if not path.exists():
        return Position()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    stamps = [found.group(1).decode() for line in whole.splitlines() if (found := LINE.match(line))]
    return Position(stamps[-1], stamps.count(stamps[-1])) if stamps else Position()


class Follower(threading.Thread):
    """Copies a pod's log to a file, and its lines to `show`, until the container has ended.

    One that is ended without having been started copies the whole log with one request.
    """

    def __init__(self, cluster: Cluster, pod: status.Json, path: Path, show: Callable[[str], None]):
        super().__init__(name=f"log-{pod['metadata']['name']}", daemon=True)
        self._cluster, self._path, self._show = cluster, path, show
        self._pod, self._container = pod["metadata"]["name"], status.container(pod).get("name", "")
        self._ended = threading.Event()

    def end(self, timeout_s: float = 15.0) -> None:
        """The container has ended: read what is left, then stop."""
        self._ended.set()
        if self.ident is None:
            self.start()
        self.join(timeout_s)

    def run(self) -> None:
        position, attempt = resume(self._path), 0
        with self._path.open("ab", buffering=0) as file:
            while True:
                last = self._ended.is_set()
                try:
                    self._copy(position, file, follow=not last)
                    attempt = 0
                except ApiError as error:
                    if error.status in (400, 404):  # gone, with its log
                        return
                    attempt += 1
                except (Unreachable, *CONNECTION_ERRORS):
                    attempt += 1
                if last and (attempt == 0 or attempt >= LAST_TRIES):
                    return
                self._ended.wait(min(10.0, 0.5 * 2 ** min(attempt, 5)) if attempt else AGAIN_S)

    def _copy(self, position: Position, file: Any, *, follow: bool) -> None:
        answer = self._cluster.log(
            self._pod,
            self._container,
            timestamps="true",
            **({"follow": "true"} if follow else {}),
            **position.rewind(),
        )
        pending = b""
        try:
            for chunk in answer.stream(amt=None, decode_content=True):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._line(line, position, file)
            if pending and not follow:
                self._line(pending, position, file)
        finally:
            answer.close()

    def _line(self, line: bytes, position: Position, file: Any) -> None:
        found = LINE.match(line)
        if found and position.is_new(found.group(1).decode()):
            file.write(line + b"\n")
            # Of a progress bar the last state: the others were drawn over.
            self._show(found.group(2).rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace"))


def tail(cluster: Cluster, pod: status.Json) -> str:
    """Return the end of a pod's log, or what its container left as its last message."""
    message = str(status.terminated(pod).get("message", ""))
    try:
        answer = cluster.log(
            pod["metadata"]["name"], status.container(pod).get("name", ""), tailLines=TAIL_LINES
        )
        text: str = answer.data.decode(errors="replace")
        answer.release_conn()
    except (ApiError, Unreachable, *CONNECTION_ERRORS):
        return message
    return text or message


def end_of(path: Path) -> str:
    """Return the end of a stored log, as the command wrote it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return without_stamps(b"".join(lines[-TAIL_LINES:])).decode(errors="replace")


def without_stamps(text: bytes) -> bytes:
    """Return a stored log as the command wrote it."""
    return b"\n".join(found.group(2) if (found := LINE.match(line)) else line for line in text.split(b"\n"))
