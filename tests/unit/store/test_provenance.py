from __future__ import annotations

import pytest
from artefacts import make

from rlhf.errors import DataError
from rlhf.store import provenance


def test_check_finds_what_is_missing_changed_and_extra(tmp_path):
    path = make(tmp_path / "x")
    (path / "a").unlink()
    (path / "b").write_text("other")
    (path / "deep" / "d").write_text("new")
    assert provenance.differences(path) == ["a is missing", "b has changed", "deep/d is not part of it"]


def test_check_does_not_mind_the_run_record_and_snakemakes_stamp(tmp_path):
    path = make(tmp_path / "x")
    (path / provenance.STAMP).touch()
    (path / provenance.RUN).write_text("{}")
    assert provenance.differences(path) == []


def test_a_file_of_that_name_further_down_is_part_of_it(tmp_path):
    path = make(tmp_path / "x")
    (path / "deep" / provenance.RUN).write_text("{}")
    assert provenance.differences(path) == [f"deep/{provenance.RUN} is not part of it"]


def test_a_directory_without_provenance_is_no_artefact(tmp_path):
    with pytest.raises(DataError, match="not an artefact"):
        provenance.differences(tmp_path)


@pytest.mark.parametrize("text", ["", '{"files": {"a"', "[]", '{"stage": "sft"}', '{"files": 3}'])
def test_a_damaged_provenance_is_reported(tmp_path, text):
    (make(tmp_path / "x") / provenance.PROVENANCE).write_text(text)
    with pytest.raises(DataError, match=r"x/provenance\.json is damaged: "):
        provenance.differences(tmp_path / "x")


def test_what_is_in_an_artefacts_place_and_is_none_is_refused_by_all_its_names(tmp_path):
    whole, *others = (tmp_path / name for name in ("whole", "half", "other", "missing"))
    make(whole)
    for half in others[:2]:
        half.mkdir()
    provenance.refuse_incomplete([whole, others[2]])
    with pytest.raises(DataError, match=f"no provenance.json in {others[0]}, {others[1]}: "):
        provenance.refuse_incomplete([whole, *others])


def test_the_artefact_that_a_file_belongs_to_is_found_through_links(tmp_path):
    path = make(tmp_path / "x")
    link = tmp_path / "link"
    link.symlink_to(path / "deep")
    assert provenance.parent_of(link / "c") == provenance.parent_of(path) == path.resolve()
    with pytest.raises(DataError, match="is not inside an artefact"):
        provenance.parent_of(tmp_path)
