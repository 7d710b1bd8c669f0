from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf import store
from rlhf.errors import UserError
from rlhf.plan import Plan
from rlhf.upkeep import Volume


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A dataset, an artefact made from it that a result names, and one that nothing names."""
    monkeypatch.chdir(tmp_path)
    for path, parents in {
        "datasets/a/b@1": {}, "store/sft/used-1": {"data": "datasets/a/b@1"}, "store/sft/idle-2": {},
    }.items():  # fmt: skip
        with store.publish(Path(path), {"stage": "sft", "parents": parents}) as draft:
            (draft.path / "file").write_text(path)
    Path("results/x").mkdir(parents=True)
    Path("results/x/actor").symlink_to("../../store/sft/used-1")
    return Volume(Path(), Plan({}, {}))


def test_what_no_result_needs_is_unused(volume):
    assert volume.unused() == [Path("store/sft/idle-2")]


def test_an_artefact_whose_parent_was_removed_by_hand_stays_in_use(volume):
    shutil.rmtree("datasets/a/b@1")
    assert volume.unused() == [Path("store/sft/idle-2")]


def test_the_name_of_a_scenario_is_answered_with_its_results(volume):
    results = {f"results/x/{name}": "store/sft/used-1/model" for name in ("sft/actor", "rlhf/actor")}
    volume.plan = Plan({}, results)
    for name in ("x", "results/x", "results/x/"):
        with pytest.raises(UserError, match="is a scenario: name one of results/x/sft/actor, results/x/rlhf"):
            volume.find(name)
