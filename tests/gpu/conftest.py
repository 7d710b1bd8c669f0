"""Tests that need a GPU: `python -m pytest tests/gpu`. Their measurements are printed at once and at the end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]
FIGURES: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false"))


@pytest.fixture(scope="session")
def figure(pytestconfig):
    """Return a function that prints a line at once, also for a run that is cut off, and keeps it for the end."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def report(line: str) -> None:
        FIGURES.append(line)
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", flush=True)

    return report


@pytest.fixture
def bench(figure):
    """Return a function that runs a benchmark, reports its lines with one of some words, and returns all lines."""
    paths = os.pathsep.join([str(PROJECT / "scripts"), os.environ.get("PYTHONPATH", "")])

    def run(command: list[str], words: tuple[str, ...]) -> list[str]:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=PROJECT,
            check=False,
            timeout=200,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        lines = (done.stdout + done.stderr).splitlines()
        for line in lines:
            if any(word in line for word in words):
                figure(line)
        return lines

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    if FIGURES:
        terminalreporter.section("figures for tests/gpu/RESULTS.md")
        name, torch_version = torch.cuda.get_device_name(), torch.__version__
        terminalreporter.write_line(f"{name}, torch {torch_version}")
        for line in FIGURES:
            terminalreporter.write_line(line)
