"""Threads for requests, and gangs whose name turns out to be in use."""

from __future__ import annotations

import threading
import time

import pytest

from snakemake_executor_plugin_kubernetes_gang import gangs, manifest, objects, workers
from snakemake_executor_plugin_kubernetes_gang.cluster import ApiError


def test_many_tasks_run_at_once_in_the_order_of_submission():
    begun, go = [], threading.Event()
    threads = workers.Workers("test", pytest.fail)
    for n in range(20):
        threads.put(lambda n=n: (begun.append(n), go.wait(10)))
    until = time.monotonic() + 5
    while len(begun) < workers.WORKERS and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == list(range(workers.WORKERS))
    go.set()
    until = time.monotonic() + 5
    while len(begun) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == list(range(20))


def test_stop_finishes_what_has_begun_and_drops_the_rest(monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 1)
    done, begun = [], threading.Event()
    threads = workers.Workers("test", pytest.fail)
    threads.put(lambda: (begun.set(), time.sleep(0.3), done.append("first")))
    threads.put(lambda: done.append("second"))
    begun.wait(5)
    threads.stop(10)
    assert done == ["first"]


def test_finish_completes_all_tasks():
    done = []
    threads = workers.Workers("test", pytest.fail)
    for n in range(20):
        threads.put(lambda n=n: (time.sleep(0.05), done.append(n)))
    threads.finish(10)
    assert sorted(done) == list(range(20))


def test_a_bug_is_reported_and_the_next_task_runs():
    errors, done = [], threading.Event()
    threads = workers.Workers("test", errors.append)
    threads.put(lambda: 1 / 0)
    threads.put(done.set)
    assert done.wait(5)
    threads.stop(10)
    assert [type(error) for error in errors] == [ZeroDivisionError]


class FakeCluster:
    """A namespace that may have a gang of which the mirrors do not know."""

    namespace = "rlhf"

    def __init__(self, *bodies):
        self.objects, self.requests = {body["metadata"]["name"]: body for body in bodies}, []

    def create(self, body, *, dry_run=False):
        self.requests.append("dry-run" if dry_run else "create")
        name = body["metadata"]["name"]
        if name in self.objects:
            raise ApiError(409, "AlreadyExists", f"{name} already exists")
        if not dry_run:
            self.objects[name] = {**body, "metadata": {**body["metadata"], "uid": "new"}}
            return self.objects[name]
        return body

    def get(self, kind, name):
        self.requests.append("get")
        return self.objects.get(name)

    def list_all(self, kind, selector="", fields=""):
        self.requests.append("list")
        return []

    def delete(self, obj, **_):
        self.requests.append("delete")
        del self.objects[obj["metadata"]["name"]]


def gangs_on(cluster):
    ours = gangs.Gangs(cluster, "here", {"Job"}, lambda text: None, pytest.fail)
    for mirror in (ours.pods, *ours.objects.values()):
        mirror.synced.set()
    return ours


def test_a_new_name_costs_two_requests(spec):
    cluster = FakeCluster()
    ours = gangs_on(cluster)
    assert ours.is_new(spec)
    assert ours.create(spec)["metadata"]["uid"] == "new"
    assert cluster.requests == ["dry-run", "create"]
    assert not ours.is_new(spec), "its pods may outlive it, so the next attempt checks"


def test_no_name_is_new_before_the_mirrors_are_synced(spec):
    ours = gangs_on(FakeCluster())
    ours.pods.synced.clear()
    assert not ours.is_new(spec)


def test_a_gang_that_a_dead_controllers_last_request_created_is_replaced(spec):
    earlier = manifest.manifests(spec)[-1]
    earlier["metadata"] |= {"uid": "old", "annotations": {objects.TOKEN: "theirs"}}
    cluster = FakeCluster(earlier)
    assert gangs_on(cluster).create(spec)["metadata"]["uid"] == "new"
    assert "delete" in cluster.requests


def test_an_object_of_somebody_else_with_the_same_name_is_kept(spec):
    earlier = manifest.manifests(spec)[-1]
    earlier["metadata"]["labels"] = {}
    cluster = FakeCluster(earlier)
    with pytest.raises(gangs.ForeignObject):
        gangs_on(cluster).create(spec)
    assert "delete" not in cluster.requests
