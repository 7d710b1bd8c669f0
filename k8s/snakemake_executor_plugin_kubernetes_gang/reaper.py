"""Deletes gangs that are done with, beside the scheduler's thread: the API may be slow or away."""

from __future__ import annotations

import queue
import threading
from typing import Any

from .cluster import ApiError
from .gangs import Gangs

FINISH_S = 30


class Reaper(threading.Thread):
    def __init__(self, gangs: Gangs):
        super().__init__(name="reaper", daemon=True)
        self._gangs = gangs
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.start()

    def put(self, gang: dict[str, Any] | None) -> None:
        if gang:
            self._queue.put(gang)

    def run(self) -> None:
        while gang := self._queue.get():
            try:
                self._gangs.cluster.delete(gang)
            except ApiError:
                # Not allowed, or not possible: ttlSecondsAfterFinished and `gc` are the net.
                continue
            finally:
                self._gangs.forget(gang["metadata"]["name"])

    def finish(self) -> None:
        """Delete what is left; what the API does not take in time is left to `gc`."""
        self._queue.put(None)
        self.join(FINISH_S)
