from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, time
from rlhf.errors import run_main

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        print("put in order")

run_main(main)
"""


def run(disposition):
    """Run the program where a shell has set what SIGINT does."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
    )  # fmt: skip


def test_a_second_interrupt_does_not_disturb_what_the_first_one_ends():
    """A Ctrl-C reaches a training from the terminal and from its launcher."""
    done = run(signal.SIG_DFL)
    assert (done.returncode, done.stdout, done.stderr) == (130, "put in order\n", "interrupted\n")


def test_a_job_in_the_background_goes_on_ignoring_interrupts():
    done = run(signal.SIG_IGN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "put in order\n", "")
