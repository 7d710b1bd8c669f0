"""Copies of pod logs: rank 0's log is also streamed to the terminal.

A stored log keeps the kubelet's timestamps. A reader needs them to resume, after a lost connection or a
restart of the controller.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import status
from .cluster import CONNECTION_ERRORS, ApiError, Cluster, Unreachable
from .objects import Json

TAIL_LINES = 200
REOPEN_S = 5.0  # after a stream that ended normally: most often the container has ended, too
# After a container's end: a node that returns nothing for this long has lost the log, or is lost itself.
# A kubelet restarts faster.
STUCK_S = 15.0
NOT_NOW = b"unable to retrieve container logs"  # a kubelet's error, sent instead of the log, with HTTP 200
LINE = re.compile(rb"^(\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)) ?(.*)$", re.DOTALL)


class Position:
    """How far a log has been read: the last timestamp, and the number of lines that have it."""

    def __init__(self, stamp: str = "", count: int = 0):
        self.stamp, self.count = stamp, count
        self._repeated, self._is_behind = 0, bool(stamp)

    def rewind(self) -> dict[str, str]:
        """Prepare for a new stream and return the query that opens it."""
        self._repeated, self._is_behind = 0, bool(self.stamp)
        # The API truncates sinceTime to seconds, so the lines of the last second are repeated.
        return {"sinceTime": self.stamp} if self.stamp else {}

    def is_new(self, stamp: str) -> bool:
        """Whether a line with this timestamp has not been read.

        Lines are repeated only at the beginning of a stream. Later lines are new whatever their
        timestamps: a node's clock may be set back.
        """
        if self._is_behind and stamp <= self.stamp:
            self._repeated += stamp == self.stamp
            if stamp < self.stamp or self._repeated <= self.count:
                return False
        self._is_behind = False
        if stamp >= self.stamp:
            self.stamp, self.count = stamp, self.count + 1 if stamp == self.stamp else 1
        return True


def resume(path: Path) -> Position:
    """Return the position at the end of a stored log; an incomplete last line is removed from the file."""
    if not path.exists():
        return Position()
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        path.write_bytes(complete)
    stamps = [match.group(1).decode() for line in complete.splitlines() if (match := LINE.match(line))]
    return Position(max(stamps), stamps.count(max(stamps))) if stamps else Position()


class Follower(threading.Thread):
    """Copies a pod's log to a file, and its lines to `show`, until the container has ended.

    If it is finished before it was started, it copies the log with one request. With `tail` it begins
    near the log's end. `is_complete`: a stream has ended normally since the last line, and all is in the file.

    A file that cannot be written, as on a full volume, is reported to `warn` once. The log is copied on, so
    that its gang ends as others do; `unwritten` has the last lines that are missing in the file.
    """

    def __init__(
        self,
        cluster: Cluster,
        pod: Json,
        path: Path,
        show: Callable[[str], None] = lambda line: None,
        *,
        warn: Callable[[str], None] = lambda line: None,
        tail: bool = False,
    ):
        super().__init__(name=f"log-{pod['metadata']['name']}", daemon=True)
        self._cluster, self._path, self._show, self._warn = cluster, path, show, warn
        self._pod, self._container = pod["metadata"]["name"], status.container(pod).get("name", "")
        self._first = {"tailLines": TAIL_LINES} if tail else {}
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._starting, self._received_at = threading.Lock(), 0.0
        self._lacks_lines = False
        self._is_at_end = False
        self.unwritten: deque[bytes] = deque(maxlen=TAIL_LINES)

    @property
    def is_complete(self) -> bool:
        return self._is_at_end and not self.unwritten

    def finish(self) -> bool:
        """Read the rest and stop, because the container has ended; False if this was called before."""
        if self._ended.is_set():
            return False
        self._received_at = time.monotonic()
        self._ended.set()
        self.follow()
        return True

    def follow(self) -> None:
        """Start once. Both a mirror's thread and Snakemake's call this."""
        with self._starting:
            if self.ident is None:
                self.start()

    def is_done(self) -> bool:
        """Whether there is nothing more to read. Time without an API server does not count as waiting."""
        if self._cluster.is_down:
            self._received_at = time.monotonic()
        if self.is_alive() and time.monotonic() - self._received_at > STUCK_S:
            self._given_up.set()
        return self._given_up.is_set() or not self.is_alive()

    def run(self) -> None:
        attempt = 0
        try:
            position = resume(self._path)
            opened: Any = self._path.open("ab", buffering=0)
        except OSError as error:
            self._warn_of(error)
            position, opened = Position(), nullcontext()
        with opened as file:
            while not self._given_up.is_set():
                last = self._ended.is_set()
                outcome = self._read(position, file, follow=not last)
                if outcome == "gone" or (last and outcome == "complete"):
                    return
                attempt = attempt + 1 if outcome == "retry" else 0
                pause = min(10.0, 0.5 * 2 ** min(attempt, 5)) if attempt else REOPEN_S
                (self._given_up if last else self._ended).wait(pause)

    def _read(self, position: Position, file: Any, *, follow: bool) -> str:
        """Copy one stream: `complete` at its end, `retry` if it broke or is not ready, `gone` with its pod."""
        try:
            self._copy(position, file, follow=follow)
            self._is_at_end = True
            return "complete"
        except ApiError as error:
            # A kubelet that has just restarted does not know its pods yet, and answers 404 as well.
            if error.status == 404 and f'pods "{self._pod}" not found' in error.message:
                return "gone"
        except (Unreachable, *CONNECTION_ERRORS):
            pass
        return "retry"

    def _copy(self, position: Position, file: Any, *, follow: bool) -> None:
        response = self._cluster.log(
            self._pod,
            self._container,
            timestamps="true",
            **({"follow": "true"} if follow else {}),
            **(position.rewind() or self._first),
        )
        pending = b""
        try:
            for chunk in response.stream(amt=None, decode_content=True):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._write(line, position, file)
            if pending and (not follow or pending.startswith(NOT_NOW)):
                self._write(pending, position, file)
        finally:
            response.close()

    def _write(self, line: bytes, position: Position, file: Any) -> None:
        if line.startswith(NOT_NOW):
            raise Unreachable(line.decode(errors="replace"))
        if self._given_up.is_set():
            return  # the file has been read, and another follower may be writing to it
        match = LINE.match(line)
        if match and position.is_new(match.group(1).decode()):
            self._received_at, self._is_at_end = time.monotonic(), False
            self._store(line, file)
            # Show only the last state of a progress bar.
            self._show(match.group(2).rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace"))

    def _store(self, line: bytes, file: Any) -> None:
        try:
            if file is None or file.write(line + b"\n") <= len(line):  # not opened, or written in part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn_of(error)
            self.unwritten.append(line + b"\n")

    def _warn_of(self, error: OSError) -> None:
        if not self._lacks_lines:
            self._lacks_lines = True
            self._warn(
                f"the log of {self._pod} is cut, because {self._path} cannot be written ({error.strerror}): free space"
                " on the volume; the pod is not stopped"
            )


def tail(path: Path, unwritten: Iterable[bytes] = ()) -> str:
    """Return the end of a stored log as its command wrote it, with what could not be written."""
    stored = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if stored and not stored[-1].endswith(b"\n"):
        stored.pop()  # written in part, and whole among the others
    return without_stamps(b"".join([*stored, *unwritten][-TAIL_LINES:])).decode(errors="replace")


def without_stamps(text: bytes) -> bytes:
    """Return a stored log as its command wrote it."""
    return b"\n".join(match.group(2) if (match := LINE.match(line)) else line for line in text.split(b"\n"))
