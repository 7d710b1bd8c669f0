"""Benchmark: time to the first output of `snakemake -n`, and of importing the configuration.

    python tests/bench/startup.py

Fails above the bounds; medians of five, after one run that warms the disk.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
REPEATS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as volume:
        plan = ["-m", "snakemake", "-n", "results/tiny/rlhf/actor", "--config", f"pvc={volume}"]
        config = [
            "-c",
            "import time; t = time.time(); from rlhf.config import scenario; print(time.time() - t)",
        ]
        found = {
            "snakemake -n": (seconds(plan, lambda wall, _: wall), 3.0),
            "import rlhf.config.scenario": (seconds(config, lambda _, said: float(said)), 0.5),
        }
    for name, (took, most) in found.items():
        print(f"{name:<20} {took:.2f} s (bound {most} s)")
    sys.exit(any(took > most for took, most in found.values()))


def seconds(arguments: list[str], read) -> float:
    """Return the median of what `read` makes of a run's wall time and output."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "scripts")}
    took = []
    for _ in range(REPEATS + 1):
        started = time.monotonic()
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        took.append(read(time.monotonic() - started, run.stdout))
    return statistics.median(took[1:])


if __name__ == "__main__":
    main()
