from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import order

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31 - 1)


@given(sizes, seeds, st.integers(0, 5))
def test_a_pass_sees_every_row_once(rows, seed, epoch):
    assert sorted(order.stream(rows, seed, epoch * rows, rows)) == list(range(rows))


@given(sizes, seeds, st.integers(0, 99), st.integers(1, 60), st.integers(1, 60))
def test_a_stream_is_the_same_however_it_is_divided(rows, seed, start, one, two):
    parts = [order.stream(rows, seed, start, one), order.stream(rows, seed, start + one, two)]
    assert np.array_equal(np.concatenate(parts), order.stream(rows, seed, start, one + two))


@given(sizes, seeds, st.integers(1, 9), st.integers(1, 5), st.integers(1, 40))
def test_all_batches_of_a_training_are_the_first_rows_of_the_stream(rows, seed, size, window, steps):
    """Also where the training ends within a window, or a pass is shorter than one."""
    lengths = np.random.default_rng(seed).integers(1, 50, rows)
    batches = [order.batch(lengths, size, step, steps, seed, window) for step in range(steps)]
    assert all(len(b) == size for b in batches)
    assert sorted(np.concatenate(batches)) == sorted(order.stream(rows, seed, 0, steps * size))


def test_a_batch_of_the_first_pass_holds_no_row_twice():
    lengths = np.random.default_rng(0).integers(1, 50, 640)
    for step in range(10):
        assert len(set(order.batch(lengths, 64, step, 25, 1))) == 64


@given(seeds)
def test_batches_of_a_window_hold_rows_of_similar_length(seed):
    lengths = np.random.default_rng(seed).integers(1, 1000, 64)
    batches = [lengths[order.batch(lengths, 8, step, 8, seed, 8)] for step in range(8)]
    assert all(list(b) == sorted(b) for b in batches)
    batches.sort(key=lambda b: (b[0], b[-1]))
    assert all(a[-1] <= b[0] for a, b in pairwise(batches))


def test_short_batches_do_not_all_come_first():
    lengths = np.arange(32 * 8)
    means = [lengths[order.batch(lengths, 8, step, 32, 1)].mean() for step in range(32)]
    assert means not in (sorted(means), sorted(means, reverse=True))


def test_a_window_of_one_leaves_rows_where_they_are():
    lengths = np.random.default_rng(0).integers(1, 9, 20)
    for step in range(6):
        rows = order.batch(lengths, 5, step, 6, 3, window=1)
        assert sorted(rows) == sorted(order.stream(20, 3, step * 5, 5))


@given(seeds)
def test_the_same_seed_gives_the_same_order(seed):
    first = order.stream(30, seed, 7, 80)
    order._pass.cache_clear()
    assert np.array_equal(first, order.stream(30, seed, 7, 80))


def test_other_seeds_and_passes_give_other_orders():
    orders = {tuple(order.stream(30, seed, epoch * 30, 30)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("start", [0, 3, 4, 5, 100])
def test_one_row_is_read_again_and_again(start):
    assert list(order.stream(1, 9, start, 3)) == [0, 0, 0]
