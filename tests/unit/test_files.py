from __future__ import annotations

import json

import pytest

from rlhf import files


def test_json_is_written_in_one_way_whatever_the_order(tmp_path):
    for name, value in (("a", {"x": 1, "y": "ä"}), ("b", {"y": "ä", "x": 1})):
        files.write_json(tmp_path / name, value)
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert text == (tmp_path / "b").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text) == {"x": 1, "y": "ä"}


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a", float("nan"))


def test_a_file_appears_when_its_content_is_complete(tmp_path):
    with files.atomic_write(tmp_path / "a") as partial:
        partial.write_text("half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "half"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"


def test_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    """A power failure must not leave a name with an empty file."""
    events = []
    fsync, rename = files.os.fsync, files.os.rename
    monkeypatch.setattr(files.os, "fsync", lambda number: (events.append("sync"), fsync(number)))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "file").write_text("content")
    files.atomic_rename(tmp_path / "draft", tmp_path / "final")
    assert events == ["sync", "sync", "rename", "sync"]
