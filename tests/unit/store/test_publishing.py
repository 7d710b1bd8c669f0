from __future__ import annotations

import json

import pytest
from artefacts import make

from rlhf.errors import UserError
from rlhf.store import provenance, publishing


def test_an_artefact_appears_whole_and_nothing_else_is_left(tmp_path):
    path = make(tmp_path / "store" / "x")
    assert [p.name for p in path.parent.iterdir()] == ["x"]
    assert {p.name for p in path.iterdir()} == {"a", "b", "deep", "provenance.json", "run.json"}
    assert provenance.differences(path) == []


def test_an_artefact_is_not_there_before_it_is_whole(tmp_path):
    with publishing.publish(tmp_path / "x", {}) as draft:
        assert not (tmp_path / "x").exists()
        assert draft.path.is_dir()
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_artefact_and_the_next_try_starts_empty(tmp_path, error):
    with pytest.raises(error), publishing.publish(tmp_path / "x", {}) as draft:  # noqa: PT012
        (draft.path / "half").write_text("half")
        raise error
    assert not (tmp_path / "x").exists()
    path = make(tmp_path / "x")
    assert not (path / "half").exists()
    assert provenance.differences(path) == []


def test_what_exists_is_not_overwritten(tmp_path):
    path = make(tmp_path / "x", a="first")
    with pytest.raises(UserError, match="exists already; nothing was overwritten"):
        make(path, a="second")
    assert (path / "a").read_text() == "first"
    assert provenance.differences(path) == []


def test_equal_work_leaves_equal_provenance_whenever_it_ran(tmp_path):
    given = {"stage": "s", "config": {"b": 1, "a": [2]}, "parents": {}}
    one = make(tmp_path / "1", given, run={"seconds": 1}, a="x", b="ä")
    two = make(tmp_path / "2", dict(reversed(given.items())), run={"seconds": 2}, b="ä", a="x")
    assert (one / provenance.PROVENANCE).read_bytes() == (two / provenance.PROVENANCE).read_bytes()
    assert (one / provenance.RUN).read_bytes() != (two / provenance.RUN).read_bytes()


def test_provenance_holds_what_was_given_and_leaves_the_original_alone(tmp_path):
    given = {"stage": "s", "config": {"a": 1}}
    record = provenance.read(make(tmp_path / "x", given))
    assert given == {"stage": "s", "config": {"a": 1}}
    assert given.items() <= record.items()
    assert record["files"].keys() == {"a", "b", "deep/c"}
    assert "numpy" in record["versions"]


def test_provenance_is_json_that_ends_with_a_newline(tmp_path):
    text = (make(tmp_path / "x") / provenance.PROVENANCE).read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("mode", "ours", "linked"), [(0o644, False, False), (0o444, False, True), (0o644, True, True)]
)
def test_what_a_user_may_still_write_to_is_copied(tmp_path, mode, ours, linked):
    source, taken = tmp_path / "rows.jsonl", tmp_path / "out/files/rows.jsonl"
    source.write_text("one")
    source.chmod(mode)
    publishing.add_file(source, taken, ours)
    assert (taken.read_text(), taken.samefile(source)) == ("one", linked)
