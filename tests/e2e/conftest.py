from __future__ import annotations

from pathlib import Path

LONGEST_FIRST = ("test_smoke", "test_learn", "test_real_weights", "test_resume")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: one that begins last would run alone."""
    files = [Path(__file__).with_name(f"{name}.py") for name in LONGEST_FIRST]
    items.sort(key=lambda item: files.index(item.path) if item.path in files else len(files))
