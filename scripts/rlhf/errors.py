"""Errors that a user can do something about."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType


class UserError(Exception):
    """Something a user can mend; printed without a traceback, exit code 2."""


class ConfigError(UserError):
    """The configuration is not valid; the text lists every mistake found."""


class DataError(UserError):
    """A dataset or an artefact does not hold what it should."""


class DivergenceError(UserError):
    """A training gave a number that is not finite."""


def first_line(error: Exception) -> str:
    """Return the first line of what a library says of an error, to stand within a sentence of ours."""
    return str(error).strip().partition("\n")[0].rstrip(". ")


def one_line(error: Exception) -> str:
    """Return all that a library says of an error, as one line."""
    return " ".join(str(error).split())


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` becomes one message on stderr and exit code 2, Ctrl-C code 130."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupts())
    gc.freeze()  # what was imported stays: the collector need not go over it again, nor at the end
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupts() -> Callable[[int, FrameType | None], None]:
    """Return a handler of SIGINT that raises KeyboardInterrupt, once a second.

    What several send for one Ctrl-C, the terminal and torchrun, would otherwise break off how the first one ends.
    """
    last = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > 1.0:
            last = time.monotonic()
            raise KeyboardInterrupt

    return handle
