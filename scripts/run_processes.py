"""torchrun, with two differences: exit code 2 for a user error, and it dies by the signal that ended it.

`launch.py` runs it, with torchrun's command line.
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rlhf.errors import USER_ERROR, killed_by


def main() -> None:
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        mistaken = [rank for rank, failure in error.failures.items() if failure.exitcode == USER_ERROR]
        if mistaken:  # those that it left waiting fail too, by other codes
            if min(mistaken) > 0:
                print(f"error: process {min(mistaken)} says in its own log what is wrong", file=sys.stderr)
            sys.exit(USER_ERROR)
        print(error.format_msg(), file=sys.stderr)
        rank, first = error.get_first_failure()
        code = first.exitcode
        sentence = killed_by(f"rank {rank}", -code) if code < 0 else f"rank {rank} failed: see its log"
        print(f"error: {sentence}", file=sys.stderr)  # last: what a reader looks at first
        sys.exit(1)
    except SignalException as stopped:  # torchrun has passed the signal on; `launch.py` reports it
        signal.signal(stopped.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), stopped.sigval)


if __name__ == "__main__":
    main()
