from __future__ import annotations

import pytest
from configurations import own_tree
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.batch import exact_div, plan_batch, rlhf_iterations, training_steps
from rlhf.config.scenario import load_config

TINY = load_config(own_tree()).scenarios["tiny"]
sizes = st.integers(1, 500)


def run(**values):
    return TINY.sft.run.model_copy(update=values)


def sft(**values):
    return TINY.sft.model_copy(update={"epochs": None, "steps": None} | values)


def rlhf(**values):
    return TINY.rlhf.model_copy(update={"epochs": None, "iterations": None} | values)


@given(sizes, sizes, st.integers(1, 8))
def test_the_three_factors_make_the_batch(micro, accumulation, processes):
    whole = micro * accumulation * processes
    made = plan_batch(whole, run(micro_batch_size=micro, processes=processes))
    assert made.micro_batch_size * made.grad_accum_steps * made.world_size == made.train_batch_size == whole
    assert (made.micro_batch_size, made.world_size) == (micro, processes)


def test_a_batch_with_a_remainder_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="65 is not a multiple of 64"):
        plan_batch(65, run(micro_batch_size=64))


@given(sizes, sizes)
def test_division_is_exact_or_refused(whole, part):
    if whole % part:
        with pytest.raises(ValueError, match=f"thing: {whole} is not a multiple of {part}"):
            exact_div(whole, part, "thing")
    else:
        assert exact_div(whole, part, "thing") * part == whole


@given(sizes, sizes)
def test_given_steps_are_taken_whatever_the_rows(steps, rows):
    assert training_steps(sft(steps=steps), rows) == steps
    assert rlhf_iterations(rlhf(iterations=steps), rows) == steps


@given(st.integers(1, 9), sizes, sizes)
def test_whole_epochs_see_every_row_and_less_than_a_batch_more(epochs, rows, size):
    for steps in (
        training_steps(sft(epochs=float(epochs), train_batch_size=size), rows),
        rlhf_iterations(rlhf(epochs=float(epochs), rollout_batch_size=size), rows),
    ):
        assert 0 <= steps * size - epochs * rows < size


@given(st.floats(0.001, 5), sizes, sizes)
def test_any_part_of_an_epoch_is_at_least_one_step(epochs, rows, size):
    assert training_steps(sft(epochs=epochs, train_batch_size=size), rows) >= 1
