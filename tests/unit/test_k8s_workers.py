"""Work beside Snakemake's thread, and names that are taken after all."""

from __future__ import annotations

import threading
import time

import pytest

from snakemake_executor_plugin_kubernetes_gang import gangs, manifest, workers
from snakemake_executor_plugin_kubernetes_gang.cluster import ApiError
from snakemake_executor_plugin_kubernetes_gang.spec import GangSpec


def test_many_are_under_way_at_once_in_the_order_in_which_they_came():
    begun, go = [], threading.Event()
    made = workers.Workers("test", pytest.fail)
    for n in range(20):
        made.put(lambda n=n: (begun.append(n), go.wait(10)))
    until = time.monotonic() + 5
    while len(begun) < workers.WORKERS and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == list(range(workers.WORKERS))
    go.set()
    until = time.monotonic() + 5
    while len(begun) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(begun) == list(range(20))


def test_stop_ends_what_has_begun_and_drops_the_rest(monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 1)
    done, begun = [], threading.Event()
    made = workers.Workers("test", pytest.fail)
    made.put(lambda: (begun.set(), time.sleep(0.3), done.append("first")))
    made.put(lambda: done.append("second"))
    begun.wait(5)
    made.stop(10)
    assert done == ["first"]


def test_finish_does_what_is_left():
    done = []
    made = workers.Workers("test", pytest.fail)
    for n in range(20):
        made.put(lambda n=n: (time.sleep(0.05), done.append(n)))
    made.finish(10)
    assert sorted(done) == list(range(20))


def test_an_error_of_ours_is_told_and_the_next_goes_on():
    told, done = [], threading.Event()
    made = workers.Workers("test", told.append)
    made.put(lambda: 1 / 0)
    made.put(done.set)
    assert done.wait(5)
    made.stop(10)
    assert [type(error) for error in told] == [ZeroDivisionError]


class FakeCluster:
    """A namespace in which one gang may be, that nobody has told of."""

    namespace = "rlhf"

    def __init__(self, *there):
        self.there, self.asked = {body["metadata"]["name"]: body for body in there}, []

    def create(self, body, *, dry_run=False):
        self.asked.append("dry-run" if dry_run else "create")
        name = body["metadata"]["name"]
        if name in self.there:
            raise ApiError(409, "AlreadyExists", f"{name} already exists")
        if not dry_run:
            self.there[name] = {**body, "metadata": {**body["metadata"], "uid": "new"}}
            return self.there[name]
        return body

    def get(self, kind, name):
        self.asked.append("get")
        return self.there.get(name)

    def list_all(self, kind, selector="", fields=""):
        self.asked.append("list")
        return []

    def delete(self, thing, **_):
        self.asked.append("delete")
        del self.there[thing["metadata"]["name"]]


def spec_in(tmp_path):
    return GangSpec(
        name="one-0123456789", command="true", workdir="/w", project="/w/Snakefile", image="i", uid=1, gid=1,
        state_dir=str(tmp_path), token="mine", labels={manifest.LABEL_PLACE: "here"},
        annotations={manifest.TOKEN: "mine"},
    )  # fmt: skip


def gangs_on(cluster):
    found = gangs.Gangs(cluster, "here", {"Job"}, lambda text: None, pytest.fail)
    for mirror in (found.pods, *found.objects.values()):
        mirror.synced.set()
    return found


def test_a_name_that_nobody_has_used_costs_two_requests(tmp_path):
    cluster = FakeCluster()
    found, spec = gangs_on(cluster), spec_in(tmp_path)
    assert found.is_new(spec)
    assert found.create(spec)["metadata"]["uid"] == "new"
    assert cluster.asked == ["dry-run", "create"]
    assert not found.is_new(spec), "its pods may outlive it: the next attempt looks"


def test_before_the_mirrors_know_anything_no_name_is_new(tmp_path):
    found = gangs_on(FakeCluster())
    found.pods.synced.clear()
    assert not found.is_new(spec_in(tmp_path))


def test_what_a_dead_controllers_last_request_has_made_is_replaced(tmp_path):
    spec = spec_in(tmp_path)
    left = manifest.manifests(spec)[-1]
    left["metadata"] |= {"uid": "old", "annotations": {manifest.TOKEN: "theirs"}}
    cluster = FakeCluster(left)
    assert gangs_on(cluster).create(spec)["metadata"]["uid"] == "new"
    assert "delete" in cluster.asked


def test_a_name_that_somebody_elses_object_has_is_left_alone(tmp_path):
    spec = spec_in(tmp_path)
    left = manifest.manifests(spec)[-1]
    left["metadata"]["labels"] = {}
    cluster = FakeCluster(left)
    with pytest.raises(gangs.Foreign):
        gangs_on(cluster).create(spec)
    assert "delete" not in cluster.asked
