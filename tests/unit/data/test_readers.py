from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.sources import Dataset
from rlhf.data import readers
from rlhf.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": [{"role": "user", "content": str(i)}]} for i in range(2500)]

NAME = "./data/mine"
COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "chosen"}


def read(files, split="train", name=NAME, columns=COLUMNS, **fields):
    """Return the rows of a dataset whose files are in a directory."""
    dataset = Dataset(name=name, split=split, columns=columns, **fields)
    return list(readers.read(files.parent, dataset))


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
    assert read(files) == ROWS


def test_csv_is_text_whatever_it_looks_like(files):
    (files / "train.csv").write_text(
        'prompt,id,response\nhello,1,"a, b"\n0007,2,True\nNA,3,"two\nlines"\n1,4,\n'
    )
    rows = read(files, columns={"prompt": "prompt", "response": "response"})
    assert [tuple(row.values()) for row in rows] == [
        ("hello", "a, b"),
        ("0007", "True"),
        ("NA", "two\nlines"),
        ("1", ""),
    ]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_saved])
def test_a_missing_split_is_reported_with_those_there_are(files, write):
    write(files)
    with pytest.raises(DataError, match=r"^\./data/mine has no split 'test'; there are train"):
        read(files, "test")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_an_empty_file_is_reported(files, name):
    (files / name).touch()
    remedy = "is empty: put rows into it, or remove it"
    with pytest.raises(DataError, match=rf"^\./data/mine/{name} {remedy}"):
        read(files)
    with pytest.raises(DataError, match=rf"^\./data/{name} {remedy}"):
        read(files, name=f"./data/{name}")


def test_a_damaged_file_is_reported(files):
    (files / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"^cannot read \./data/mine/train\.parquet: "):
        read(files)


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
        (
            '{"prompt": "\\ud83d"}',
            "utf-8",
            'half a surrogate pair, which is no character ({"prompt": "\\ud83d"})',
        ),
        ('{"prompt": 1, "prompt": 2}', "utf-8", 'the key \'prompt\' twice ({"prompt": 1, "prompt": 2})'),
        ("[1, 2]", "utf-8", "not a JSON object ([1, 2])"),
    ],
)
def test_a_broken_line_is_reported_by_its_number_and_the_users_name(files, bad, encoding, said):
    (files / "mine.jsonl").write_bytes(broken([11, 15], bad).encode(encoding))
    message = f"./data/mine.jsonl, line 11: {said}: correct or remove the line (2 such lines)"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read(files, name="./data/mine.jsonl")


def test_one_broken_line_in_a_later_file_of_a_directory_is_reported_with_the_file(files):
    write_jsonl(files, "train-1.jsonl")
    (files / "train-2.jsonl.gz").write_bytes(gzip.compress(broken([3], "oops").encode()))
    message = "./data/train-2.jsonl.gz, line 3: not JSON (oops): correct or remove the line"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read(files, name="./data/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (broken([3], "oops"), "line 3"),
        ("[\n1,\n2", "entry 1: not a JSON object"),
        ('{\n"prompt": 1\n}', "neither a list"),
    ],
)
def test_json_is_read_by_lines_only_where_it_is_lines(files, text, said):
    (files / "train.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read(files)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_another_encoding_is_said_and_can_be_named(files, ending):
    text = {".jsonl": '{"prompt": "\u00fcber", "response": "x"}\n', ".csv": "prompt,response\n\u00fcber,x\n"}[
        ending
    ]
    (files / f"train{ending}").write_bytes(text.encode("cp1252"))
    columns = {"prompt": "prompt", "response": "response"}
    with pytest.raises(DataError, match=rf"train{ending}, line \d: not UTF-8 .*`encoding`.*cp1252"):
        read(files, columns=columns)
    assert read(files, columns=columns, encoding="cp1252") == [{"prompt": "\u00fcber", "response": "x"}]


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), data=st.data())
def test_all_formats_and_compressions_give_the_same_rows(rows, data, tmp_path_factory):
    """A byte order mark at the beginning is no text."""
    rows = [(first.lstrip("\ufeff") or "x", second) for first, second in rows]
    table = [dict(zip(("prompt", "response"), row, strict=True)) for row in rows]
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows([("prompt", "response"), *rows])
    written = {
        ".csv": lines.getvalue().encode(),
        ".jsonl": "".join(
            json.dumps(row, ensure_ascii=data.draw(st.booleans())) + "\n" for row in table
        ).encode(),
        ".json": json.dumps(table, indent=data.draw(st.sampled_from([None, 1]))).encode(),
    }
    packed = data.draw(st.sampled_from(list(COMPRESS)))
    for ending, content in written.items():
        root = tmp_path_factory.mktemp("formats")
        (root / "files").mkdir()
        (root / "files" / f"rows{ending}{packed}").write_bytes(COMPRESS[packed](content))
        assert read(root / "files", columns={"prompt": "prompt", "response": "response"}) == table, ending
    root = tmp_path_factory.mktemp("formats")
    (root / "files").mkdir()
    pq.write_table(pa.Table.from_pylist(table), root / "files/rows.parquet")
    assert read(root / "files", columns={"prompt": "prompt", "response": "response"}) == table


def test_columns_that_nobody_named_are_not_looked_at(files):
    """huggingface/datasets#6460: text after many numbers in a column that is not used."""
    rows = [{**row, "id": number if number < 2400 else "x"} for number, row in enumerate(ROWS)]
    (files / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(files) == [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in ROWS]


def test_a_saved_format_neither_converts_nor_hides_columns(files):
    """huggingface/datasets#5073, #5050."""
    saved = datasets.Dataset.from_list(ROWS).with_format("pandas", columns=["prompt"])
    saved.save_to_disk(str(files))
    assert read(files) == ROWS


def test_a_list_longer_than_what_is_read_at_a_time(files, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 50)
    (files / "train.json").write_text(json.dumps(ROWS, indent=1))
    assert read(files) == ROWS


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('{"prompt": "\\ud83d"}', "half a surrogate pair"),
        ('{"prompt": 1, "prompt": 2}', "the key 'prompt' twice"),
        ("[1, 2]", "not a JSON object"),
    ],
)
def test_entries_of_a_list_are_checked_as_lines_are(files, entry, said):
    (files / "train.json").write_text(f'[{{"prompt": "x"}},\n{entry}]')
    with pytest.raises(DataError, match=rf"train\.json, entry 2: {said}.*: correct or remove it"):
        read(files, columns={"prompt": "prompt"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,response\na,b\nc,d,e\n", "line 3: 3 fields, but the header has 2"),
        ('prompt,response\na,"b\n', "line 2: unexpected end of data"),
        ("prompt,prompt\na,b\n", "names a column twice"),
    ],
)
def test_a_broken_table_is_reported_by_its_line(files, text, said):
    (files / "train.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        read(files, columns={"prompt": "prompt", "response": "prompt"})


def test_a_truncated_compressed_file_is_reported(files):
    (files / "train.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 9999)[:-20])
    with pytest.raises(DataError, match=r"cannot read \./data/mine/train\.jsonl\.gz"):
        read(files, columns={"prompt": "prompt"})
