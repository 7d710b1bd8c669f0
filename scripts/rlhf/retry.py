"""Trying again what may succeed the next time, with a limit and a growing pause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from rlhf.errors import UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds
Result = TypeVar("Result")


class Transient(Exception):
    """Something that may go better the next time; `wait` is what the other side asked for, in s."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def retried(
    what: str,
    action: Callable[[], Result],
    moved: Callable[[], object] = lambda: None,
    sleep: Callable[[float], object] | None = None,
) -> Result:
    """Return what `action` returns, trying again after a `Transient`.

    Args:
        moved: something that changes with progress; while it does, attempts start anew.
        sleep: waits so many seconds, or less where there is no use in waiting.

    Raises:
        UserError: it failed ATTEMPTS times in a row without progress.
    """
    failed, before = 0, moved()
    while True:
        try:
            return action()
        except Transient as error:
            failed, before = (1, moved()) if moved() != before else (failed + 1, before)
            if failed == ATTEMPTS:
                raise UserError(f"{what}: {error} ({ATTEMPTS} attempts)") from None
            pause = min(error.wait or FIRST_PAUSE * 2 ** (failed - 1), LONGEST_PAUSE)
            logger.warning("%s: %s; trying again in %.0f s", what, error, pause)
            (sleep or time.sleep)(pause)
