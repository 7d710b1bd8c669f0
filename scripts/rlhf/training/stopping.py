"""Stopping a training by SIGTERM: it saves a state at the next step, and ends so that it can be resumed."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from rlhf import parallel
from rlhf.errors import Stopped

ECHO_S = 2.0  # one request may come several times: to the process group, and from those that pass it on


class StopRequest:
    """In its block SIGTERM is a request, which all processes of a training heed after the same step.

    A second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def is_agreed(self) -> bool:
        """Return whether there is a request to any process; all of them call it together."""
        return bool(parallel.all_max([int(self._since is not None)])[0])


def stopped(step: int) -> Stopped:
    """Return the error that ends a training whose state after `step` is saved."""
    return Stopped(f"stopped after step {step}, whose state is saved: the same command resumes from there")
