from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf import datafiles
from rlhf.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": [{"role": "user", "content": str(i)}]} for i in range(2500)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def write_jsonl(files, name="train.jsonl"):
    (files / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(files):
    (files / "train.json").write_text(json.dumps(ROWS))


def write_parquet(files):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.slice(0, 1100), files / "train-00000-of-00002.parquet", row_group_size=700)
    pq.write_table(table.slice(1100), files / "train-00001-of-00002.parquet")


def write_saved(files):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(files))


def write_saved_alone(files):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(files))


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_parquet, write_saved, write_saved_alone])
def test_every_format_gives_the_same_rows_in_order(files, write):
    write(files)
    assert list(datafiles.read(files.parent, "train")) == ROWS


def test_csv_gives_text(files):
    (files / "train.csv").write_text('prompt,response\nhello,"a, b"\n')
    assert list(datafiles.read(files.parent, "train")) == [{"prompt": "hello", "response": "a, b"}]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_saved])
def test_a_missing_split_is_told_with_those_there_are(files, write):
    write(files)
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        list(datafiles.read(files.parent, "test"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_an_empty_file_is_told(files, name):
    (files / name).touch()
    with pytest.raises(DataError, match=f"{name} is empty"):
        list(datafiles.read(files.parent, "train"))


def test_a_damaged_file_is_told(files):
    (files / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot read split 'train'"):
        list(datafiles.read(files.parent, "train"))
