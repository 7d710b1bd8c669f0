"""Tests that need a GPU: `python -m pytest tests/gpu`. What they measure is printed at the end."""

from __future__ import annotations

import pytest
import torch

FIGURES: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false"))


@pytest.fixture(scope="session")
def figure():
    """Return a function that takes a line for the summary."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter) -> None:
    if FIGURES:
        terminalreporter.section("figures for tests/gpu/RESULTS.md")
        name, torch_version = torch.cuda.get_device_name(), torch.__version__
        terminalreporter.write_line(f"{name}, torch {torch_version}")
        for line in FIGURES:
            terminalreporter.write_line(line)
