"""Which files are read: by the card, or by words of their paths; what is unclear is refused."""

from __future__ import annotations

import re

import pytest

from rlhf.config.sources import Dataset
from rlhf.data.discovery import files_of
from rlhf.errors import DataError


def found(root, files, split="train", subset=None, name="./mine"):
    """Return the files that are read of those that are made."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    dataset = Dataset(name=name, split=split, subset=subset, columns={"prompt": "prompt"})
    return [path.relative_to(root).as_posix() for path in files_of(root, dataset)]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["chats.jsonl"], "train", ["chats.jsonl"]),
        (["test_chats.jsonl"], "train", ["test_chats.jsonl"]),
        (["b.jsonl", "a.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "package.json"], "train", ["train.jsonl"]),
        (
            ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"],
            "test",
            ["data/test-0.parquet"],
        ),
        (["train/a.csv", "dev/a.csv"], "validation", ["dev/a.csv"]),
        (["trainers.jsonl", "other.jsonl"], "train", ["other.jsonl", "trainers.jsonl"]),
        (["train.jsonl", ".cache/train.jsonl", "README.md", "notes.txt"], "train", ["train.jsonl"]),
        (["my [v1] (copy)/train.jsonl.gz"], "train", ["my [v1] (copy)/train.jsonl.gz"]),
    ],
)
def test_a_split_is_a_word_of_a_path(tmp_path, files, split, expected):
    assert found(tmp_path, files, split) == expected


def test_a_missing_split_is_reported_with_those_there_are(tmp_path):
    with pytest.raises(DataError, match=r"no split 'validation'; there are test, train: correct `split`"):
        found(tmp_path, ["train.jsonl", "test.jsonl"], "validation")


SUBSETS = ["en/train/0.parquet", "fr/train/0.parquet", "en/test/0.parquet"]


def test_subsets_are_never_mixed_unless_that_is_said(tmp_path):
    """huggingface/dataset-viewer#2625: a directory as `refs/convert/parquet` has it."""
    with pytest.raises(DataError, match=r"has 2 subsets \(en, fr\): name one as `subset`"):
        found(tmp_path, SUBSETS)
    assert found(tmp_path, SUBSETS, subset="fr") == ["fr/train/0.parquet"]
    assert found(tmp_path, SUBSETS, subset="*") == SUBSETS[:2]
    with pytest.raises(DataError, match=r"no subset 'de'; there are en, fr"):
        found(tmp_path, SUBSETS, subset="de")


def test_one_split_in_two_formats_is_refused(tmp_path):
    with pytest.raises(DataError, match=re.escape("in several formats (.jsonl, .parquet)")):
        found(tmp_path, ["train.jsonl", "train.parquet"])


CARD = """---
configs:
- config_name: chats
  default: true
  data_files:
  - {split: train, path: "chats/*.jsonl"}
  - {split: test, path: ["held/one.jsonl", "held/two.jsonl"]}
- config_name: pairs
  data_files: "**/pairs-?.jsonl"
---
# A card
"""
FILES = ["chats/a.jsonl", "chats/deep/b.jsonl", "held/one.jsonl", "held/two.jsonl", "far/off/pairs-1.jsonl"]


@pytest.mark.parametrize(
    ("split", "subset", "expected"),
    [
        ("train", None, ["chats/a.jsonl"]),
        ("test", None, ["held/one.jsonl", "held/two.jsonl"]),
        ("train", "pairs", ["far/off/pairs-1.jsonl"]),
        ("train", "*", ["chats/a.jsonl", "far/off/pairs-1.jsonl"]),
    ],
)
def test_a_card_decides_where_there_is_one(tmp_path, split, subset, expected):
    (tmp_path / "README.md").write_text(CARD)
    assert found(tmp_path, FILES, split, subset) == expected


@pytest.mark.parametrize("entry", ["{split: train}", '{path: "*.jsonl"}', "{split: train, path: [1]}", "7"])
def test_a_card_with_files_of_another_form_is_refused(tmp_path, entry):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_files: [{entry}]\n---\n")
    with pytest.raises(DataError, match=r"`data_files` has .*: correct the card"):
        found(tmp_path, FILES)


def test_a_card_without_a_default_asks_for_a_subset(tmp_path):
    (tmp_path / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(DataError, match=r"2 subsets \(chats, pairs\)"):
        found(tmp_path, FILES)


def test_links_are_followed_and_circles_are_not(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/train.jsonl").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/data").symlink_to("../far")
    (tmp_path / "far/again").symlink_to("../in")
    assert found(tmp_path / "in", []) == ["data/train.jsonl"]
