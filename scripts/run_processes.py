"""torchrun, except that it exits with 2 when a process ended with a user error.

`launch.py` runs it; it takes torchrun's command line.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

USER_ERROR = 2  # of `rlhf.errors.run_main`


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
        sys.exit(1)


if __name__ == "__main__":
    main()
