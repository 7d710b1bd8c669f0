"""Work ahead of its use: in order, one item at a time, with its errors."""

from __future__ import annotations

import threading

import pytest

from rlhf.data.ahead import ahead


def test_the_next_item_is_made_while_the_last_is_used_and_no_other():
    made, requested = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 1:
            requested.set()
        return item * item

    squares = ahead(make, range(5))
    assert next(squares) == 0
    assert requested.wait(10), "the second item waits for a request"
    assert made == [0, 1]
    assert list(squares) == [1, 4, 9, 16]
    assert made == list(range(5))


def test_an_error_comes_with_its_item():
    found = ahead(lambda item: 1 // item, [1, 0, 2])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_nothing_gives_nothing():
    assert list(ahead(str, [])) == []
