"""A gang is found by its working directory, whatever the options of the next run are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snakemake_executor_plugin_kubernetes_gang import gangs, objects, state
from snakemake_executor_plugin_kubernetes_gang.spec import Volume, workdir_identity


def test_a_directory_keeps_its_identity_when_a_volume_is_added(tmp_path):
    first = workdir_identity("/volume/run", [Volume("data", "/volume")])
    more = workdir_identity("/volume/run", [Volume("data", "/volume"), Volume("cache", "/cache")])
    assert more != first
    assert state.stored_identity(tmp_path / "state", first) == first
    assert state.stored_identity(tmp_path / "state", more) == first
    assert state.stored_identity(tmp_path / "other", more) == more


def test_content_is_on_disk_before_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    """A power failure must not leave a name with an empty file, nor lose the record of a running gang."""
    events = []
    fsync, rename = state.os.fsync, state.os.rename
    monkeypatch.setattr(state.os, "fsync", lambda number: (events.append("sync"), fsync(number)))
    monkeypatch.setattr(state.os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    state.write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert events == ["sync", "rename", "sync"]


class Cluster:
    """A namespace with one object of each given kind."""

    def __init__(self, **objects: dict):
        self.namespace, self.objects, self.deleted = "here", objects, []

    def get(self, kind, _):
        return self.objects.get(kind)

    def delete(self, obj, **_):
        self.deleted.append(obj["kind"])
        self.objects.pop(obj["kind"], None)

    def list_all(self, *_):
        return []


def gang(kind: str = "JobSet", **annotations: str) -> dict:
    labels = {objects.LABEL_WORKDIR_ID: "here"}
    return {"kind": kind, "metadata": {"name": "x", "uid": "u", "labels": labels, "annotations": annotations}}


def gangs_on(cluster: Cluster) -> tuple[gangs.Gangs, list[str]]:
    said: list[str] = []
    return gangs.Gangs(cluster, "here", {"Job"}, said.append, pytest.fail), said


def test_a_gang_of_another_backend_is_ended(spec):
    cluster = Cluster(JobSet=gang())
    mine, said = gangs_on(cluster)
    mine.end_elsewhere(spec)
    assert not cluster.deleted, "no gang was created before"
    state.record_creation(spec.state_dir, "JobSet", "here")
    mine.end_elsewhere(spec)
    assert cluster.deleted == ["JobSet"]
    assert "is replaced: it is a JobSet" in said[0]


def test_a_gang_in_another_namespace_is_stopped_through_the_volume(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(gangs, "FENCE_S", 0)
    mine, said = gangs_on(Cluster())
    state.record_creation(spec.state_dir, "Job", "there")
    mine.end_elsewhere(spec)
    assert "in the namespace there" in said[0]
    assert (tmp_path / "token").read_text() == f"{spec.token}\n"


def test_a_gang_that_another_directory_started_is_neither_used_nor_ended(spec):
    theirs = gang("Job", **{objects.WORKDIR: "/t9k/mnt/run"})
    mine, _ = gangs_on(Cluster(Job=theirs))
    ours = replace(spec, annotations={objects.WORKDIR: "/volume/run"})
    with pytest.raises(gangs.ForeignObject, match=r"started from /t9k/mnt/run.*a copy, remove .*/place"):
        mine.find(ours)
    assert mine.find(replace(spec, annotations={objects.WORKDIR: "/t9k/mnt/run"}))
    assert gangs_on(Cluster())[0].find(ours) is None
