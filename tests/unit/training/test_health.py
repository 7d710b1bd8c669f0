from __future__ import annotations

import logging

import pytest

from rlhf.training.health import BOUNDS, Health

WELL = {
    "first_approx_kl": 1e-6,
    "sampler_kl": 1e-5,
    "sampler_outside": 0.0,
    "sampler_ess": 1.0,
    "ratio_mean": 1.0,
    "clip_fraction": 0.1,
    "approx_kl": 0.01,
    "kl_ref": 3.0,
    "entropy": 3.0,
    "explained_variance": 0.5,
    "ended": 0.9,
    "length": 14.0,
    "score_length_correlation": 0.3,
}


def said(caplog, *iterations):
    health, caplog.handler.level = Health(), logging.INFO
    with caplog.at_level(logging.INFO, "rlhf.training.health"):
        for number, values in enumerate(iterations, 1):
            health.look(number, WELL | values)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_healthy_training_is_not_reported(caplog):
    assert said(caplog, {}, {}) == []


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.metric)
def test_each_metric_outside_its_bounds_is_reported_in_words(caplog, bound):
    value = bound.most + 1 if bound.most < float("inf") else bound.least - 0.05
    ((level, text),) = said(caplog, *([{bound.metric: value}] * bound.since))
    assert level == "WARNING"
    assert text.startswith(f"iteration {bound.since}: {bound.metric} = ")
    assert bound.meaning in text


def test_a_critic_is_not_judged_before_it_has_learned(caplog):
    assert said(caplog, *[{"explained_variance": -6.0}] * 9) == []


def test_rounding_below_zero_is_well(caplog):
    assert said(caplog, {"first_approx_kl": -7e-11, "approx_kl": -1e-9}) == []


def test_leaving_and_coming_back_are_reported_once_each(caplog):
    far = {"kl_ref": 12.0}
    lines = said(caplog, {}, far, far, {}, {}, far)
    assert [(level, text.split(":")[0]) for level, text in lines] == [
        ("WARNING", "iteration 2"),
        ("INFO", "iteration 4"),
        ("WARNING", "iteration 6"),
    ]
    assert "kl_ref = 12 is above 10: responses are far from the SFT model's" in lines[0][1]


def test_a_value_that_is_no_number_is_not_well(caplog):
    assert len(said(caplog, {"kl_ref": float("nan")})) == 1
