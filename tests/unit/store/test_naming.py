from __future__ import annotations

import os

from rlhf.store import naming

SPEC = {
    "stage": "s",
    "config": {"a": 1, "b": {"c": 2, "d": 3}},
    "seed": 1,
    "parents": {"x": "1", "y": "2"},
    "code": "c",
}


def test_a_key_is_a_function_of_content_and_not_of_order():
    other = {"code": "c", "parents": {"y": "2", "x": "1"}, "seed": 1}
    assert naming.key(SPEC) == naming.key(other | {"config": {"b": {"d": 3, "c": 2}, "a": 1}, "stage": "s"})


def test_every_part_of_a_key_counts():
    changes = [
        {},
        {"stage": "t"},
        {"config": {"a": 2, "b": {"c": 2, "d": 3}}},
        {"seed": 2},
        {"parents": {"x": "2", "y": "2"}},
        {"parents": {"z": "1", "y": "2"}},
        {"code": "other"},
    ]
    keys = {naming.key(SPEC | change) for change in changes}
    assert len(keys) == len(changes)
    assert all(len(key) == 12 for key in keys)


def test_a_stage_without_a_seed_has_another_key():
    assert naming.key({name: value for name, value in SPEC.items() if name != "seed"}) != naming.key(SPEC)


def test_a_fingerprint_changes_with_names_sizes_and_times_of_files(tmp_path):
    file = tmp_path / "rows" / "a.jsonl"
    file.parent.mkdir()
    file.write_text("one")
    found = [naming.fingerprint(file.parent)]
    os.utime(file, (1, 1))
    found.append(naming.fingerprint(file.parent))
    file.write_text("three")
    os.utime(file, (1, 1))
    found.append(naming.fingerprint(file.parent))
    file.rename(file.with_name("b.jsonl"))
    found.append(naming.fingerprint(file.parent))
    assert len(set(found)) == 4
    assert naming.fingerprint(file.parent) == found[-1]


def test_paths_that_do_not_exist_have_one_fingerprint(tmp_path):
    assert naming.fingerprint(tmp_path / "a") == naming.fingerprint(tmp_path / "b")
