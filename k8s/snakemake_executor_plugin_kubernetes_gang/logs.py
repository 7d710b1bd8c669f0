"""Logs of pods: rank 0's streams to the terminal and to a file, every rank's end is kept.

A file keeps the kubelet's timestamps. They are what a reader needs to go on where it stopped, after a
lost connection as after a restart of the controller.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import status
from .cluster import CONNECTION_ERRORS, ApiError, Cluster, Unreachable

TAIL_LINES = 200
AGAIN_S = 5.0  # after a stream that ended well: most often the container has, too
# After a container's end: a node that gives nothing for so long has the log no more, or is lost. A kubelet that
# restarts is back before.
STUCK_S = 15.0
NOT_NOW = b"unable to retrieve container logs"  # a kubelet's answer, in the place of a log, with HTTP 200
LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)) ?(.*)$", re.DOTALL)


class Position:
    """How far a log has been read: the last timestamp, and how many lines had it."""

    def __init__(self, stamp: str = "", count: int = 0):
        self.stamp, self.count = stamp, count
        self._again, self._is_behind = 0, bool(stamp)

    def rewind(self) -> dict[str, str]:
        """Prepare for a stream that starts again; return the query that asks for it."""
        self._again, self._is_behind = 0, bool(self.stamp)
        # The API cuts sinceTime to seconds, so lines of the last second come again.
        return {"sinceTime": self.stamp} if self.stamp else {}

    def is_new(self, stamp: str) -> bool:
        """Whether a line with this timestamp has not been read.

        Only the beginning of a stream can come again. Later a line is new whatever its stamp says: a
        node's clock may be set back.
        """
        if self._is_behind and stamp <= self.stamp:
            self._again += stamp == self.stamp
            if stamp < self.stamp or self._again <= self.count:
                return False
        self._is_behind = False
        if stamp >= self.stamp:
            self.stamp, self.count = stamp, self.count + 1 if stamp == self.stamp else 1
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
    return Position(max(stamps), stamps.count(max(stamps))) if stamps else Position()


class Follower(threading.Thread):
    """Copies a pod's log to a file, and its lines to `show`, until the container has ended.

    One that is finished without having been started copies the log with one request. With `tail` it begins
    at the log's end. `is_whole`: whether a stream has ended by itself since the last line.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: status.Json,
        path: Path,
        show: Callable[[str], None] = lambda line: None,
        *,
        tail: bool = False,
    ):
        super().__init__(name=f"log-{pod['metadata']['name']}", daemon=True)
        self._cluster, self._path, self._show = cluster, path, show
        self._pod, self._container = pod["metadata"]["name"], status.container(pod).get("name", "")
        self._first = {"tailLines": TAIL_LINES} if tail else {}
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._starting, self._heard_at = threading.Lock(), 0.0
        self.is_whole = False

    def finish(self) -> bool:
        """The container has ended: read what is left, then stop. Whether this is the first to say so."""
        if self._ended.is_set():
            return False
        self._heard_at = time.monotonic()
        self._ended.set()
        self.follow()
        return True

    def follow(self) -> None:
        """Start, where it has not been. A mirror's thread asks for it as well as Snakemake's."""
        with self._starting:
            if self.ident is None:
                self.start()

    def is_done(self) -> bool:
        """Whether nothing more is to be had. While the API server is away it has not been asked."""
        if self._cluster.is_down:
            self._heard_at = time.monotonic()
        if self.is_alive() and time.monotonic() - self._heard_at > STUCK_S:
            self._given_up.set()
        return self._given_up.is_set() or not self.is_alive()

    def run(self) -> None:
        position, attempt = resume(self._path), 0
        with self._path.open("ab", buffering=0) as file:
            while not self._given_up.is_set():
                last = self._ended.is_set()
                outcome = self._read(position, file, follow=not last)
                if outcome == "gone" or (last and outcome == "whole"):
                    return
                attempt = attempt + 1 if outcome == "later" else 0
                pause = min(10.0, 0.5 * 2 ** min(attempt, 5)) if attempt else AGAIN_S
                (self._given_up if last else self._ended).wait(pause)

    def _read(self, position: Position, file: Any, *, follow: bool) -> str:
        """Copy a stream to its end: `whole`. Or it broke, or cannot be had now: `later`. Or never: `gone`."""
        try:
            self._copy(position, file, follow=follow)
            self.is_whole = True
            return "whole"
        except ApiError as error:
            # A kubelet that has restarted does not know its pods yet, and answers 404 as well.
            if error.status == 404 and f'pods "{self._pod}" not found' in error.message:
                return "gone"
        except (Unreachable, *CONNECTION_ERRORS):
            pass
        return "later"

    def _copy(self, position: Position, file: Any, *, follow: bool) -> None:
        answer = self._cluster.log(
            self._pod,
            self._container,
            timestamps="true",
            **({"follow": "true"} if follow else {}),
            **(position.rewind() or self._first),
        )
        pending = b""
        try:
            for chunk in answer.stream(amt=None, decode_content=True):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._line(line, position, file)
            if pending and (not follow or pending.startswith(NOT_NOW)):
                self._line(pending, position, file)
        finally:
            answer.close()

    def _line(self, line: bytes, position: Position, file: Any) -> None:
        if line.startswith(NOT_NOW):
            raise Unreachable(line.decode(errors="replace"))
        if self._given_up.is_set():
            return  # the file has been read, and may be another follower's by now
        found = LINE.match(line)
        if found and position.is_new(found.group(1).decode()):
            self._heard_at, self.is_whole = time.monotonic(), False
            file.write(line + b"\n")
            # Of a progress bar the last state: the others were drawn over.
            self._show(found.group(2).rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace"))


def end_of(path: Path) -> str:
    """Return the end of a stored log, as the command wrote it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return without_stamps(b"".join(lines[-TAIL_LINES:])).decode(errors="replace")


def without_stamps(text: bytes) -> bytes:
    """Return a stored log as the command wrote it."""
    return b"\n".join(found.group(2) if (found := LINE.match(line)) else line for line in text.split(b"\n"))
