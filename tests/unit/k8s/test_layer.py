"""`make test-k8s` without a cluster: skipped with a reason, or an error if it is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(("required", "fails"), [("", False), ("1", True)])
@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_a_machine_without_a_cluster_reports_why(folder, required, fails):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("K8S_") and k != "MAKEFLAGS"}
    environment |= {"K8S_TEST_CLUSTER": folder, "K8S_REQUIRED": required}
    environment["PYTHONPATH"] = f"{REPO}/scripts:{REPO}/k8s"
    command = [
        "make",
        *(f"--old-file={sys.prefix}/.installed{part}" for part in ("", "-test")),
        f"VENV={sys.prefix}",
        "test-k8s",
    ]
    run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    reason = f"no script {folder}/cluster: set" if folder else "no cluster: set"
    assert f"the k8s layer is skipped: {reason} K8S_TEST_CLUSTER" in run.stderr
    assert bool(run.returncode) == fails
