from __future__ import annotations

import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data import readers
from rlhf.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": [{"role": "user", "content": str(i)}]} for i in range(2500)]

NAME = "./data/mine"


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
    assert list(readers.read(files.parent, "train", NAME)) == ROWS


def test_csv_gives_text(files):
    (files / "train.csv").write_text('prompt,response\nhello,"a, b"\n')
    assert list(readers.read(files.parent, "train", NAME)) == [{"prompt": "hello", "response": "a, b"}]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_saved])
def test_a_missing_split_is_reported_with_those_there_are(files, write):
    write(files)
    with pytest.raises(DataError, match=r"^\./data/mine has no split 'test'; there are train"):
        list(readers.read(files.parent, "test", NAME))


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_an_empty_file_is_reported(files, name):
    (files / name).touch()
    remedy = "is empty: put rows into it, or remove it"
    with pytest.raises(DataError, match=rf"^\./data/mine/{name} {remedy}"):
        list(readers.read(files.parent, "train", NAME))
    with pytest.raises(DataError, match=rf"^\./data/{name} {remedy}"):
        list(readers.read(files.parent, "train", f"./data/{name}"))


def test_a_damaged_file_is_reported(files):
    (files / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"^cannot read split 'train' of \./data/mine: "):
        list(readers.read(files.parent, "train", NAME))


def broken(place, bad, rows=20):
    """Return lines of JSON of which those at `place`, counted from 1, are replaced."""
    lines = [json.dumps(row) for row in ROWS[:rows]]
    for number in place:
        lines[number - 1] = bad
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("bad", "encoding", "said"),
    [
        ('{"prompt": "do you like fish n', "utf-8", 'not JSON ({"prompt": "do you like fish n)'),
        ('{"prompt": "' + "x" * 99, "utf-8", 'not JSON ({"prompt": "' + "x" * 48 + "...)"),
        ('{"prompt": "\u00e9"}', "latin-1", 'not UTF-8 ({"prompt": "\ufffd"})'),
        ("[1, 2]", "utf-8", "not a JSON object ([1, 2])"),
    ],
)
def test_a_broken_line_is_reported_by_its_number_and_the_users_name(files, bad, encoding, said):
    (files / "mine.jsonl").write_bytes(broken([11, 15], bad).encode(encoding))
    message = f"./data/mine.jsonl, line 11: {said}: correct or remove the line (2 such lines)"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(readers.read(files.parent, "train", "./data/mine.jsonl"))


def test_one_broken_line_in_a_later_file_of_a_directory_is_reported_with_the_file(files):
    write_jsonl(files, "train-1.jsonl")
    (files / "train-2.jsonl.gz").write_bytes(gzip.compress(broken([3], "oops").encode()))
    message = "./data/train-2.jsonl.gz, line 3: not JSON (oops): correct or remove the line"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(readers.read(files.parent, "train", "./data/"))


@pytest.mark.parametrize(
    ("text", "said"), [(broken([3], "oops"), "line 3"), ("[\n1,\n2", "cannot read split")]
)
def test_json_is_read_by_lines_only_where_it_is_lines(files, text, said):
    (files / "train.json").write_text(text)
    with pytest.raises(DataError, match=said):
        list(readers.read(files.parent, "train", NAME))
