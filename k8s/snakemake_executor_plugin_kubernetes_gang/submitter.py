"""Creates gangs beside the scheduler's thread, several at a time, in the order in which they came."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

SUBMITTERS = 8
FINISH_S = 10


class Submitter:
    """Runs what it is given in threads of its own. `failed` hears of exceptions, which are our bugs."""

    def __init__(self, failed: Callable[[Exception], None]):
        self._failed = failed
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Daemons: one that waits for an API server that is away must not keep Snakemake from ending.
        names = [f"submitter-{n}" for n in range(SUBMITTERS)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def put(self, submit: Callable[[], None]) -> None:
        self._queue.put(submit)

    def _run(self) -> None:
        while submit := self._queue.get():
            try:
                submit()
            except Exception as error:
                self._failed(error)

    def stop(self) -> None:
        """Drop what has not begun, and wait for what has: its gang is there, or never will be."""
        while not self._queue.empty():
            self._drop()
        for _ in self._threads:
            self._queue.put(None)
        until = time.monotonic() + FINISH_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _drop(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:  # a thread was quicker
            return
