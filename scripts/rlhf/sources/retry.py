"""Repeating what failed temporarily: a limited number of attempts, with growing pauses."""

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
    """A failure after which another attempt may succeed; `wait`: seconds that the server requested."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def retried(
    what: str,
    action: Callable[[], Result],
    position: Callable[[], object] = lambda: None,
    sleep: Callable[[float], object] | None = None,
) -> Result:
    """Return the result of `action`, which is called again after a `Transient`.

    Args:
        what: a name for messages.
        position: a value that changes with progress; progress resets the count of attempts.
        sleep: waits for a number of seconds, or less if waiting has become pointless.

    Raises:
        UserError: `action` failed ATTEMPTS times in a row without progress.
    """
    failed, before = 0, position()
    while True:
        try:
            return action()
        except Transient as error:
            failed, before = (1, position()) if position() != before else (failed + 1, before)
            if failed == ATTEMPTS:
                raise UserError(f"{what}: {error} ({ATTEMPTS} attempts)") from None
            pause = min(error.wait or FIRST_PAUSE * 2 ** (failed - 1), LONGEST_PAUSE)
            logger.warning("%s: %s; trying again in %.0f s", what, error, pause)
            (sleep or time.sleep)(pause)
