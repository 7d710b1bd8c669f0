"""Benchmark: time to the end of `snakemake -n`, beside that of an empty workflow, and of importing the configuration.

    python tests/bench/startup.py

Fails if a plan takes more than `MOST` times as long as that of an empty workflow, which says how fast the
machine is. Medians of five, after one run that warms the disk.
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
MOST = 2.0  # times an empty workflow's plan
MOST_IMPORTING = 0.5  # seconds; 0.3 on a fast machine


def main() -> None:
    snakemake = ["-m", "snakemake", "-n"]
    with tempfile.TemporaryDirectory() as volume:
        workflow = Path(volume, "Snakefile")
        workflow.write_text("rule nothing:\n    output: 'x'\n    shell: 'touch {output}'\n")
        empty = seconds([*snakemake, "--snakefile", str(workflow), "--directory", volume])
        plan = seconds([*snakemake, "results/tiny/rlhf/actor", "--config", f"pvc={volume}"])
    imported = seconds(["-c", "import rlhf.config.scenario"]) - seconds(["-c", ""])
    print(f"snakemake -n {plan:.2f} s, {plan / empty:.2f} times an empty workflow's (at most {MOST})")
    print(f"import rlhf.config.scenario {imported:.2f} s (at most {MOST_IMPORTING} s)")
    sys.exit(plan > MOST * empty or imported > MOST_IMPORTING)


def seconds(arguments: list[str]) -> float:
    """Return the median wall time of some runs of Python."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "scripts")}
    took = []
    for _ in range(REPEATS + 1):
        started = time.monotonic()
        subprocess.run(
            [sys.executable, *arguments], cwd=PROJECT, env=environment, capture_output=True, check=True
        )
        took.append(time.monotonic() - started)
    return statistics.median(took[1:])


if __name__ == "__main__":
    main()
