from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from rlhf.logs import last_words

PROGRAM = """
import os, signal, sys, time
from rlhf.errors import run_main

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
    finally:
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        print("put in order")

run_main(main)
"""


def run(later, disposition):
    """Run the program where a shell has set what SIGINT does; the second one comes `later` seconds later."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(later)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
    )


@pytest.mark.parametrize(("later", "printed"), [(0, "put in order\n"), (1.2, "")])
def test_an_interrupt_that_comes_twice_is_one_and_a_later_one_breaks_off_the_end(later, printed):
    """A Ctrl-C reaches a training from the terminal and from torchrun."""
    done = run(later, signal.SIG_DFL)
    assert (done.returncode, done.stdout, done.stderr) == (130, printed, "interrupted\n")


def test_a_job_in_the_background_keeps_ignoring_interrupts():
    done = run(0, signal.SIG_IGN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "put in order\n", "")


BAR = """
import sys
from rlhf.errors import UserError, run_main
from rlhf.progress import progress

def main():
    for item in progress(range(9), "rows", unit="row"):
        if item == 5:
            raise UserError("the sixth row")

run_main(main)
"""


def test_a_message_is_not_on_the_line_of_an_open_bar(tmp_path):
    """Where it was, `last_words` took the bar for the reason."""
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (tmp_path / "log").write_text(done.stderr)
    assert last_words(tmp_path / "log") == "error: the sixth row"
