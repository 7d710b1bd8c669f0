"""Threads for requests to the API, which may be slow or absent: Snakemake's own thread must not wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

WORKERS = 8


class Workers:
    """Runs tasks, several at a time. Unexpected exceptions, which are our bugs, go to `on_error`."""

    def __init__(self, name: str, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stopped = False
        # Daemons: a thread that waits for an absent API server must not keep Snakemake from exiting.
        names = [f"{name}-{n}" for n in range(WORKERS)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def put(self, task: Callable[[], None]) -> None:
        """Queue a task."""
        self._queue.put(task)

    def _run(self) -> None:
        while task := self._queue.get():
            try:
                task()
            except Exception as error:
                self._on_error(error)

    def stop(self, limit_s: float) -> None:
        """Drop tasks that have not started, and wait for the others."""
        self.stopped = True
        while not self._queue.empty():
            self._drop()
        self.finish(limit_s)

    def _drop(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:  # a thread has taken it
            return

    def finish(self, limit_s: float) -> None:
        """Wait until all tasks are done, at most `limit_s` seconds."""
        for _ in self._threads:
            self._queue.put(None)
        until = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
