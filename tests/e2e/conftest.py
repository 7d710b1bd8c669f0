"""Tests that share an expensive pipeline run in one process, the others beside it."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shares = "smoke" if "smoke" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(shares))
