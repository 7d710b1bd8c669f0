from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from rlhf import files
from rlhf.errors import UserError
from rlhf.store import provenance, publishing
from rlhf.store.inventory import Volume
from rlhf.store.plan import Artefact, Plan


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A dataset, an artefact made from it that a result names, and one that nothing names."""
    monkeypatch.chdir(tmp_path)
    for path, parents in {
        "datasets/a/b@1": {},
        "store/sft/used-1": {"data": "datasets/a/b@1"},
        "store/sft/idle-2": {},
    }.items():
        with publishing.publish(Path(path), {"stage": "sft", "parents": parents}) as draft:
            (draft.path / "file").write_text(path)
    Path("results/x").mkdir(parents=True)
    Path("results/x/actor").symlink_to("../../store/sft/used-1")
    return Volume(Path(), Plan({}, {}))


def test_what_no_result_needs_is_unused(volume):
    assert volume.unused() == [Path("store/sft/idle-2")]


def test_a_link_that_leads_into_no_artefact_is_passed_over(volume):
    Path("results/x/notes").symlink_to("../../datasets")
    Path("results/x/gone").symlink_to("../../store/sft/none")
    assert volume.names() == {Path("store/sft/used-1"): ["results/x/actor"]}


def test_work_that_a_process_holds_stays(volume):
    """Another configuration may have started it."""
    works = [Path("work/sft/here"), Path("work/models/a/b@1"), Path("work/reward/left")]
    for work in works:
        work.mkdir(parents=True)
        (work / "lock").touch()
    Path("store/reward/.left.partial").mkdir(parents=True)
    os.utime("store/reward/.left.partial", (0, 0))
    with (works[0] / "lock").open() as one, (works[1] / "lock").open() as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(two, fcntl.LOCK_EX)
        assert volume.unused()[1:] == [Path("store/reward/.left.partial"), works[2]]
    assert set(works) < set(volume.unused())


def test_a_draft_that_was_written_to_within_the_hour_stays(volume):
    """No process holds a work directory of data, responses and built-in sources."""
    draft, now = Path("store/data/.rlhf-3.partial"), time.time()
    (draft / "train").mkdir(parents=True)
    (draft / "train/tokens").touch()
    for path, age in ((draft / "train", 9000), (draft, 9000), (draft / "train/tokens", 600)):
        os.utime(path, (now - age, now - age))
    assert draft not in volume.unused()
    os.utime(draft / "train/tokens", (now - 9000, now - 9000))
    assert draft in volume.unused()


def test_what_comes_into_use_after_it_was_shown_is_not_removed(volume):
    work, draft = Path("work/sft/left"), Path("store/data/.rlhf-3.partial")
    for path in (work, draft):
        path.mkdir(parents=True)
    (work / "lock").touch()
    os.utime(draft, (0, 0))
    shown = volume.unused()
    assert {work, draft} < set(shown)
    (draft / "rows").touch()
    with (work / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert set(volume.remove(shown)) == {work, draft}
    assert [path.exists() for path in (work, draft, Path("store/sft/idle-2"))] == [True, True, False]


def test_work_left_behind_says_how_far_it_has_come(volume):
    for step in ("step-000100", "step-000250", "step-000300.partial"):
        Path("work/sft/left", step).mkdir(parents=True)
    (work,) = [path for path in volume.unused() if path.parts[0] == "work"]
    assert volume.describe(work).endswith("work/sft/left  an unfinished training, saved at step 250")
    assert volume.describe(Path("store/sft/idle-2")).endswith("store/sft/idle-2")


def test_a_result_of_a_scenario_that_was_not_read_leads_to_its_artefact(volume):
    assert volume.find("results/x/actor") == Path("store/sft/used-1")


def test_what_is_in_an_artefacts_place_without_a_provenance_is_found(volume):
    """But not what a user keeps below models/, nor a draft."""
    half, planned, *others = map(
        Path,
        ("store/reward/half-3", "models/builtin/m@4", "models/opt-13b/onnx", "store/reward/.left-5.partial"),
    )
    for path in (half, planned, *others):
        path.mkdir(parents=True)
    volume.plan = Plan({str(planned): Artefact(str(planned), "model", {}, None, "", (), "")}, {})
    assert volume.incomplete() == [planned, half]


def test_an_artefact_whose_parent_was_removed_by_hand_stays_in_use(volume):
    shutil.rmtree("datasets/a/b@1")
    assert volume.unused() == [Path("store/sft/idle-2")]


def test_a_name_that_is_none_or_several_is_reported_with_those_it_may_be(volume):
    with pytest.raises(UserError, match="'nothing' names no artefact; see `ls`"):
        volume.find("nothing")
    with pytest.raises(UserError, match="'1' may mean datasets/a/b@1, store/sft/used-1;"):
        volume.find("1")
    volume.plan = Plan(dict.fromkeys((f"store/data/{n}-x" for n in range(9)), None), {})
    with pytest.raises(UserError, match=r"'-x' may mean store/data/0-x, .*, store/data/3-x and 5 more;"):
        volume.find("-x")


@pytest.fixture
def related(tmp_path, monkeypatch):
    """Return a function: a changed rate and step count -> the volume with a plan that asks for them."""
    monkeypatch.chdir(tmp_path)

    def specs(suffix, rate, steps, code="c"):
        reward, rlhf = f"store/reward/{suffix}", f"store/rlhf/{suffix}"
        return {
            reward: {"stage": "reward", "config": {"optimizer": {"rate": rate}}, "parents": {}, "code": "c"},
            rlhf: {"stage": "rlhf", "config": {"steps": steps}, "parents": {"reward": reward}, "code": code},
            f"store/eval/{suffix}": {
                "stage": "eval",
                "config": {},
                "parents": {"reward": reward, "rlhf": rlhf},
                "code": "c",
            },
        }

    for suffix, values in (("old", (0.1, 5)), ("older", (0.7, 9))):
        for path, spec in specs(suffix, *values).items():
            with publishing.publish(Path(path), spec) as draft:
                (draft.path / "file").write_text("")

    def volume(*values):
        made = {
            path: Artefact(path, spec["stage"], spec, None, "", (), "")
            for path, spec in specs("new", *values).items()
        }
        return Volume(Path(), Plan(made, {}))

    return volume


def test_why_names_the_fields_that_differ_wherever_they_are_with_both_values_and_once(related):
    assert related(0.2, 5).why("store/eval/new") == [
        "store/eval/new is missing",
        "it differs from store/eval/old in:",
        "  reward.optimizer.rate: 0.2, there 0.1",
    ]
    assert related(0.1, 6, "d").why("rlhf/new")[2:] == [
        "  rlhf.steps: 6, there 5",
        "  the code that makes rlhf",
    ]


def test_why_names_parents_that_are_gone(related):
    shutil.rmtree("store/reward/old")
    shutil.rmtree("store/rlhf/older")
    assert related(0.1, 5).why("rlhf/new")[2:] == [
        "  reward of rlhf: store/reward/new, there store/reward/old"
    ]


def test_the_name_of_a_scenario_is_reported_with_its_results(volume):
    results = {f"results/x/{name}": "store/sft/used-1/model" for name in ("sft/actor", "rlhf/actor")}
    volume.plan = Plan({}, results)
    for name in ("x", "results/x", "results/x/"):
        with pytest.raises(UserError, match="is a scenario: name one of results/x/sft/actor, results/x/rlhf"):
            volume.find(name)


def test_what_is_adopted_says_when_and_with_what_it_was_made(related):
    old = Path("store/rlhf/old")
    record = provenance.read(old) | {"versions": {"torch": "1.0"}}
    files.write_json(old / provenance.PROVENANCE, record)
    files.write_json(old / provenance.RUN, {"seconds": 7})
    volume = related(0.1, 5)
    assert volume.adopt("store/rlhf/new")[-1] == "store/rlhf/new adopted from store/rlhf/old"
    assert provenance.read(Path("store/rlhf/new"))["versions"] == {"torch": "1.0"}
    assert json.loads(Path("store/rlhf/new", provenance.RUN).read_text()) == {"seconds": 7}
