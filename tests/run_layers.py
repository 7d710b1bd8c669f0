"""Run layers of tests one after another; a layer in which no test ran is a failure.

python tests/run_layers.py unit math workflow e2e
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SIDE_BY_SIDE = ["--numprocesses", "logical", "--maxprocesses", "4", "--dist"]
OPTIONS = {
    "unit": [*SIDE_BY_SIDE, "loadfile"],
    "math": [*SIDE_BY_SIDE, "loadfile"],
    "workflow": [*SIDE_BY_SIDE, "load"],
    "e2e": [*SIDE_BY_SIDE, "loadfile", "--no-loadscope-reorder"],  # its conftest knows an order
    "k8s": ["-p", "no:randomly"],  # one cluster, whose faults have an order
}


def main() -> None:
    passed = failed = skipped = 0
    for layer in sys.argv[1:]:
        print(f"== {layer}", flush=True)
        command = [sys.executable, "-m", "pytest", str(TESTS / layer), "--durations=10"]
        command += OPTIONS.get(layer, [])
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent, check=False)
        print(run.stdout, flush=True)
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", run.stdout)}
        passed += counts.get("passed", 0)
        skipped += counts.get("skipped", 0)
        failed += counts.get("failed", 0) + counts.get("error", 0)
        if not counts.get("passed") and not counts.get("failed"):
            print(f"layer {layer} ran no test")
            failed += 1
        elif run.returncode and not counts.get("failed") and not counts.get("error"):
            print(f"layer {layer}: pytest ended with {run.returncode}")
            failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
