"""A gang is found by its directory, whatever the options of the next start are."""

from __future__ import annotations

import pytest
from test_k8s_manifest import spec

from snakemake_executor_plugin_kubernetes_gang import gangs, manifest, place
from snakemake_executor_plugin_kubernetes_gang.spec import Volume, place_of


def test_a_directory_keeps_its_name_when_a_volume_is_added(tmp_path):
    first = place_of("/volume/run", [Volume("data", "/volume")])
    more = place_of("/volume/run", [Volume("data", "/volume"), Volume("cache", "/cache")])
    assert more != first
    assert place.identity(tmp_path / "state", first) == first
    assert place.identity(tmp_path / "state", more) == first
    assert place.identity(tmp_path / "other", more) == more


class Cluster:
    """What is there, by kind; what is deleted."""

    def __init__(self, **there: dict):
        self.namespace, self.there, self.deleted = "here", there, []

    def get(self, kind, _):
        return self.there.get(kind)

    def delete(self, thing, **_):
        self.deleted.append(thing["kind"])
        self.there.pop(thing["kind"], None)

    def list_all(self, *_):
        return []


def made(kind: str = "JobSet", **annotations: str) -> dict:
    labels = {manifest.LABEL_PLACE: "abcdef"}
    return {"kind": kind, "metadata": {"name": "x", "uid": "u", "labels": labels, "annotations": annotations}}


def all_of(cluster: Cluster) -> tuple[gangs.Gangs, list[str]]:
    said: list[str] = []
    return gangs.Gangs(cluster, "abcdef", {"Job"}, said.append, pytest.fail), said


def test_a_gang_of_another_backend_is_ended(tmp_path):
    case, cluster = spec(state_dir=str(tmp_path)), Cluster(JobSet=made())
    mine, said = all_of(cluster)
    mine.end_elsewhere(case)
    assert not cluster.deleted, "nothing was ever made"
    place.note(case.state_dir, "JobSet", "here")
    mine.end_elsewhere(case)
    assert cluster.deleted == ["JobSet"]
    assert "is replaced: it is a JobSet" in said[0]


def test_a_gang_in_another_namespace_is_told_through_the_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(gangs, "FENCE_S", 0)
    case = spec(state_dir=str(tmp_path))
    mine, said = all_of(Cluster())
    place.note(case.state_dir, "Job", "there")
    mine.end_elsewhere(case)
    assert "in the namespace there" in said[0]
    assert (tmp_path / "token").read_text() == f"{case.token}\n"


def test_a_gang_that_another_directory_started_is_neither_taken_up_nor_ended():
    theirs = made("Job", **{manifest.WORKDIR: "/t9k/mnt/run"})
    mine, _ = all_of(Cluster(Job=theirs))
    ours = spec(annotations={manifest.WORKDIR: "/volume/run"})
    with pytest.raises(gangs.Foreign, match=r"started from /t9k/mnt/run.*a copy, remove .*/place"):
        mine.find(ours)
    assert mine.find(spec(annotations={manifest.WORKDIR: "/t9k/mnt/run"}))
    assert all_of(Cluster())[0].find(ours) is None
