"""Running the real Snakefile."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No test is timed: a busy machine fails none.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

PROJECT = Path(__file__).resolve().parents[1]


class Pipeline:
    """The project's Snakefile on a volume of its own."""

    def __init__(self, volume: Path, project: Path = PROJECT) -> None:
        self.volume, self.project = volume, project

    def command(self, *arguments: str, config: str = "") -> list[str]:
        """Return the command line of Snakemake; `config` is YAML that is laid over config.yaml."""
        extra = self.volume / "overrides.yaml"
        extra.write_text(f"pvc: {self.volume}\n{config}")
        return [sys.executable, "-m", "snakemake", *arguments, "--configfile", str(extra)]

    def start(self, *arguments: str, config: str = "") -> subprocess.Popen:
        """Start Snakemake in the background."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(self.command(*arguments, config=config), cwd=self.project, **quiet)

    def snakemake(self, *arguments: str, config: str = "", check: bool = True) -> subprocess.CompletedProcess:
        """Run Snakemake to its end."""
        command = self.command(*arguments, config=config)
        run = subprocess.run(command, cwd=self.project, capture_output=True, text=True, check=False)
        if check:
            assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
        return run

    def jobs(self, *targets: str, config: str = "") -> dict[str, int]:
        """Return rule -> number of jobs that Snakemake would run."""
        text = self.snakemake("-n", *targets, config=config).stdout
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", text, re.M | re.S)
        if table is None:
            assert "Nothing to be done" in text, text
            return {}
        return {line.split()[0]: int(line.split()[1]) for line in table[1].splitlines()}

    def artefact(self, result: str) -> Path:
        """Return the artefact that a name under results/ leads into."""
        path = (self.volume / "results" / result).resolve()
        return path if (path / "provenance.json").exists() else path.parent


def heed_ctrl_c() -> None:
    """Undo what tests inherit that a shell has started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(found: Callable[[], Any], seconds: float = 600) -> Any:
    """Return what `found` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.fixture
def empty(tmp_path: Path) -> Pipeline:
    """The pipeline on an empty volume."""
    return Pipeline(tmp_path)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The pipeline after `smoke`; test processes that run side by side make it once, and copy it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-made"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            shared.mkdir()
            names = ["sft/actor", "reward/model", "rlhf/actor", "rlhf/critic", "rlhf/eval", "rlhf/curves.png"]
            Pipeline(shared).snakemake(*(f"results/smoke/{name}" for name in names))
            (shared / "done").touch()
    return Pipeline(shutil.copytree(shared, base / "smoke", symlinks=True))
