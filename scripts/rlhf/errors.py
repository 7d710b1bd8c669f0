"""Errors that a user can do something about."""

from __future__ import annotations

import gc
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from rlhf.machine import is_rank_zero

# Exit codes of a process that ends with a `UserError`, and with `Stopped` (EX_TEMPFAIL of sysexits.h).
USER_ERROR, RESUMABLE = 2, 75


class UserError(Exception):
    """A mistake that a user can correct; printed without a traceback, exit code 2."""


class ConfigError(UserError):
    """The configuration is not valid; the text lists every mistake found."""


class DataError(UserError):
    """A dataset or an artefact does not have the content that it should."""


class DivergenceError(UserError):
    """A training produced a number that is not finite."""


class Stopped(Exception):
    """A training was asked to stop, and has saved its state."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, to be part of a sentence of ours."""
    return str(error).strip().partition("\n")[0].rstrip(". ")


def one_line(error: Exception) -> str:
    """Return a library's error as one line."""
    return " ".join(str(error).split())


def killed_by(process: str, number: int) -> str:
    """Say which signal ended a process, why that may be, and how to resume."""
    why = ", as the kernel does when memory runs out (mem_mb)" if number == signal.SIGKILL else ""
    name = signal.Signals(number).name
    return f"{process} was ended by {name}{why}; the same command resumes from the last saved state"


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` becomes one message on stderr and exit code 2, Ctrl-C code 130.

    A training that was stopped and can be resumed ends with code 75.
    """
    level = logging.INFO if is_rank_zero() else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupts())
    gc.freeze()  # imported objects stay: the collector need not visit them again, nor at the end
    try:
        main()
    except (UserError, Stopped) as error:
        # Imported here: a command that starts no job needs no bars.
        from rlhf.progress import close_bars  # noqa: PLC0415

        close_bars()
        is_mistake = isinstance(error, UserError)
        print(f"error: {error}" if is_mistake else error, file=sys.stderr)
        sys.exit(USER_ERROR if is_mistake else RESUMABLE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupts() -> Callable[[int, FrameType | None], None]:
    """Return a handler of SIGINT that raises KeyboardInterrupt, once a second.

    For one Ctrl-C the terminal and torchrun each send a signal: the second must not interrupt the cleanup.
    """
    last = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > 1.0:
            last = time.monotonic()
            raise KeyboardInterrupt

    return handle
