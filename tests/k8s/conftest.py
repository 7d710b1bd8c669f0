"""The cluster of this layer: started once, taken down at the end. See harness.py."""

from __future__ import annotations

import pytest

import harness

# Faults of nodes come before controllers are installed on them: their webhooks would be away too.
ORDER = ("gangs", "life", "failures", "outages", "pipeline", "backends", "base")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    ours = [
        item for item in items if item.path.parent.name == "k8s" and item.path.parent.parent.name == "tests"
    ]
    order = sorted(ours, key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))
    items[:] = [item for item in items if item not in ours] + order


@pytest.fixture(scope="session", autouse=True)
def live():
    reason = harness.why_not()
    if reason:
        pytest.skip(reason)
    with harness.running():
        yield


@pytest.fixture
def workdir(request):
    """Make working directories; when the test has failed, their controllers' output is shown."""
    made = []

    def make(snakefile: str, name: str = "", **template) -> harness.Workdir:
        made.append(harness.Workdir(name or f"{request.node.name[:40]}-{len(made)}", snakefile, **template))
        return made[-1]

    yield make
    for one in made:
        print(f"== {one.path}\n{one.said()}")
        harness.kubectl(
            "delete",
            "jobs,services",
            "-n",
            harness.NAMESPACE,
            "-l",
            f"kubernetes-gang/place={one.place()}",
            "--wait=false",
            check=False,
        )
