"""torchrun, with three differences.

A user error has exit code 2, and a training that was stopped has the code that says so. It passes SIGTERM on
and waits: torchrun would kill processes that save a state for more than half a minute. It dies by the signal
that ended it.

`launch.py` runs it, with torchrun's command line.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rlhf.errors import RESUMABLE, USER_ERROR, killed_by


def main() -> None:
    passed_on: set[int] = set()
    signal.signal(signal.SIGTERM, lambda received, _: _pass_on(received, passed_on))
    try:
        run.main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if RESUMABLE in codes.values():
            sys.exit(RESUMABLE)
        mistaken = [rank for rank, code in codes.items() if code == USER_ERROR]
        if mistaken:  # those that it left waiting fail too, by other codes
            if min(mistaken) > 0:
                print(f"error: process {min(mistaken)} says in its own log what is wrong", file=sys.stderr)
            sys.exit(USER_ERROR)
        rank, first = error.get_first_failure()
        code = first.exitcode
        if -code in passed_on:  # `launch.py` reports it
            _die_by(-code)
        print(error.format_msg(), file=sys.stderr)
        sentence = killed_by(f"rank {rank}", -code) if code < 0 else f"rank {rank} failed: see its log"
        print(f"error: {sentence}", file=sys.stderr)  # last: what a reader looks at first
        sys.exit(1)
    except SignalException as stopped:  # torchrun has passed the signal on; `launch.py` reports it
        _die_by(stopped.sigval)


def _pass_on(received: int, passed_on: set[int]) -> None:
    """Send a signal to this process's children, as Linux lists them, and note it."""
    passed_on.add(received)
    for thread in Path("/proc/self/task").iterdir():
        for child in (thread / "children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), received)


def _die_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
