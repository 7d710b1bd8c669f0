from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.rows import PARTS, Rows, RowWriter

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)


def written(path, parts, rows):
    with RowWriter(path, parts) as writer:
        for row in rows:
            writer.append(row)
    return Rows(path)


@pytest.mark.parametrize("stage", PARTS)
@given(data=st.data())
def test_what_is_written_is_read(tmp_path_factory, stage, data):
    parts = PARTS[stage]
    rows = data.draw(st.lists(st.lists(tokens, min_size=len(parts), max_size=len(parts)), max_size=6))
    read = written(tmp_path_factory.mktemp("rows") / "x", parts, rows)
    assert len(read) == len(rows)
    assert [[list(part) for part in row] for row in (read[i] for i in range(len(read)))] == rows
    assert list(read.tokens_per_row) == [sum(map(len, row)) for row in rows]


def test_rows_are_arrays_of_int32_and_can_be_joined(tmp_path):
    read = written(tmp_path / "x", PARTS["sft"], [[[1, 2], [3]], [[4], []]])
    assert all(part.dtype == np.int32 for part in read[0])
    assert list(np.concatenate(read[0])) == [1, 2, 3]


def test_rows_end_where_a_sequence_ends(tmp_path):
    read = written(tmp_path / "x", PARTS["rlhf"], [[[1]], [[2]]])
    assert [int(row[0][0]) for row in read] == [1, 2]
    with pytest.raises(IndexError):
        read[2]


def test_equal_rows_make_equal_files(tmp_path):
    for name in ("1", "2"):
        written(tmp_path / name, PARTS["sft"], [[[1, 2], [3]], [[4], [5, 6]]])
    for file in ("tokens.bin", "index.npy"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_a_split_is_not_written_over(tmp_path):
    written(tmp_path / "x", PARTS["rlhf"], [[[1]]])
    with pytest.raises(FileExistsError):
        RowWriter(tmp_path / "x", PARTS["rlhf"])
