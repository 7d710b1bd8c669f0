from __future__ import annotations

import json

import pytest

from rlhf import store
from rlhf.errors import DataError, UserError


def make(path, provenance=None, run=None, **files):
    """Publish an artefact of text files."""
    with store.publish(path, provenance or {"stage": "test"}) as draft:
        for name, text in (files or {"a": "one", "b": "two"}).items():
            (draft.path / name).write_text(text)
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "c").write_text("three")
        draft.run |= run or {}
    return path


def test_an_artefact_appears_whole_and_nothing_else_is_left(tmp_path):
    path = make(tmp_path / "store" / "x")
    assert [p.name for p in path.parent.iterdir()] == ["x"]
    assert {p.name for p in path.iterdir()} == {"a", "b", "deep", "provenance.json", "run.json"}
    assert store.check(path) == []


def test_an_artefact_is_not_there_before_it_is_whole(tmp_path):
    with store.publish(tmp_path / "x", {}) as draft:
        assert not (tmp_path / "x").exists()
        assert draft.path.is_dir()
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_artefact_and_the_next_try_starts_empty(tmp_path, error):
    with pytest.raises(error), store.publish(tmp_path / "x", {}) as draft:  # noqa: PT012
        (draft.path / "half").write_text("half")
        raise error
    assert not (tmp_path / "x").exists()
    path = make(tmp_path / "x")
    assert not (path / "half").exists()
    assert store.check(path) == []


def test_what_exists_is_not_overwritten(tmp_path):
    path = make(tmp_path / "x", a="first")
    with pytest.raises(UserError, match="exists already; nothing was overwritten"):
        make(path, a="second")
    assert (path / "a").read_text() == "first"
    assert store.check(path) == []


def test_check_finds_what_is_missing_changed_and_extra(tmp_path):
    path = make(tmp_path / "x")
    (path / "a").unlink()
    (path / "b").write_text("other")
    (path / "deep" / "d").write_text("new")
    assert store.check(path) == ["a is missing", "b has changed", "deep/d is not part of it"]


def test_check_does_not_mind_the_run_record_and_snakemakes_stamp(tmp_path):
    path = make(tmp_path / "x")
    (path / store.STAMP).touch()
    (path / store.RUN).write_text("{}")
    assert store.check(path) == []


def test_a_file_of_that_name_further_down_is_part_of_it(tmp_path):
    path = make(tmp_path / "x")
    (path / "deep" / store.RUN).write_text("{}")
    assert store.check(path) == [f"deep/{store.RUN} is not part of it"]


def test_a_directory_without_provenance_is_no_artefact(tmp_path):
    with pytest.raises(DataError, match="not an artefact"):
        store.check(tmp_path)


@pytest.mark.parametrize("text", ["", '{"files": {"a"', "[]", '{"stage": "sft"}', '{"files": 3}'])
def test_a_damaged_provenance_is_told(tmp_path, text):
    (make(tmp_path / "x") / store.PROVENANCE).write_text(text)
    with pytest.raises(DataError, match=r"x/provenance\.json is damaged: "):
        store.check(tmp_path / "x")


def test_what_lies_in_an_artefacts_place_and_is_none_is_refused_by_all_its_names(tmp_path):
    whole, *others = (tmp_path / name for name in ("whole", "half", "other", "missing"))
    make(whole)
    for half in others[:2]:
        half.mkdir()
    store.refuse_not_whole([whole, others[2]])
    with pytest.raises(DataError, match=f"no provenance.json in {others[0]}, {others[1]}: "):
        store.refuse_not_whole([whole, *others])


def test_equal_work_leaves_equal_provenance_whenever_it_ran(tmp_path):
    given = {"stage": "s", "config": {"b": 1, "a": [2]}, "parents": {}}
    one = make(tmp_path / "1", given, run={"seconds": 1}, a="x", b="ä")
    two = make(tmp_path / "2", dict(reversed(given.items())), run={"seconds": 2}, b="ä", a="x")
    assert (one / store.PROVENANCE).read_bytes() == (two / store.PROVENANCE).read_bytes()
    assert (one / store.RUN).read_bytes() != (two / store.RUN).read_bytes()


def test_provenance_holds_what_was_given_and_leaves_the_original_alone(tmp_path):
    given = {"stage": "s", "config": {"a": 1}}
    record = store.read_provenance(make(tmp_path / "x", given))
    assert given == {"stage": "s", "config": {"a": 1}}
    assert given.items() <= record.items()
    assert record["files"].keys() == {"a", "b", "deep/c"}
    assert "numpy" in record["versions"]


def test_provenance_is_json_that_ends_with_a_newline(tmp_path):
    text = (make(tmp_path / "x") / store.PROVENANCE).read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_the_artefact_that_a_file_lies_in_is_found_through_links(tmp_path):
    path = make(tmp_path / "x")
    link = tmp_path / "link"
    link.symlink_to(path / "deep")
    assert store.parent_of(link / "c") == store.parent_of(path) == path.resolve()
    with pytest.raises(DataError, match="does not lie in an artefact"):
        store.parent_of(tmp_path)


def test_a_key_is_a_function_of_content_and_not_of_order():
    one = store.key("s", {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "1", "y": "2"}, "code")
    assert one == store.key("s", {"b": {"d": 3, "c": 2}, "a": 1}, {"y": "2", "x": "1"}, "code")


def test_every_part_of_a_key_counts():
    keys = {
        store.key("s", {"a": 1}, {"x": "1"}, "code"),
        store.key("t", {"a": 1}, {"x": "1"}, "code"),
        store.key("s", {"a": 2}, {"x": "1"}, "code"),
        store.key("s", {"a": 1}, {"x": "2"}, "code"),
        store.key("s", {"a": 1}, {"y": "1"}, "code"),
        store.key("s", {"a": 1}, {"x": "1"}, "other"),
    }
    assert len(keys) == 6
    assert all(len(key) == 12 for key in keys)


@pytest.mark.parametrize(
    ("mode", "ours", "linked"), [(0o644, False, False), (0o444, False, True), (0o644, True, True)]
)
def test_what_a_user_may_still_write_to_is_copied(tmp_path, mode, ours, linked):
    source, taken = tmp_path / "rows.jsonl", tmp_path / "out/files/rows.jsonl"
    source.write_text("one")
    source.chmod(mode)
    store.take(source, taken, ours)
    assert (taken.read_text(), taken.samefile(source)) == ("one", linked)
