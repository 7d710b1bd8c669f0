"""SIGTERM as a request: heeded after a step, once however often it comes, and at once the second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from rlhf.training import stopping
from rlhf.training.stopping import StopRequest


def test_a_signal_is_a_request_inside_of_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.is_agreed()
        for _ in range(3):  # the same request, from several
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_agreed()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_request_ends_the_process_at_once():
    program = """
import os, signal, time
from rlhf.training import stopping
stopping.ECHO_S = 0.05
with stopping.StopRequest() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print(request.is_agreed(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there", flush=True)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (-signal.SIGTERM, "True\n")


def test_the_end_says_that_it_can_be_resumed():
    assert str(stopping.stopped(7)).startswith("stopped after step 7, whose state is saved")
