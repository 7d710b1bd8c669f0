"""The cluster of this layer: started once, taken down at the end. See harness.py."""

from __future__ import annotations

import os

import pytest

import harness

# Faults of nodes come before controllers are installed on them: their webhooks would be away too.
ORDER = ("gangs", "life", "failures", "outages", "pipeline", "backends", "base")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))


@pytest.fixture(scope="session", autouse=True)
def live():
    """A running cluster with the rights of k8s/base; K8S_TEST_KEEP=1 leaves it running."""
    reason = harness.why_not()
    if reason:
        pytest.skip(reason)
    if harness.OURS:
        harness.start_cluster()
        os.chown(harness.volume(), harness.OWNER, harness.OWNER)
    for name in ("rbac.yaml", "rbac-backends.yaml"):
        harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", str(harness.REPO / "k8s" / "base" / name))
    yield
    if harness.OURS and not os.environ.get("K8S_TEST_KEEP"):
        harness.cluster("down")


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
