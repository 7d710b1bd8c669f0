from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from rlhf import jsonl
from rlhf.store.layout import CURVES, METRICS
from rlhf.training import metrics

STEPS = 200


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Return a function: lines of metrics -> the figure that was drawn of them."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)

    def draw(lines):
        jsonl.write(tmp_path / METRICS, lines)
        metrics.draw(tmp_path / METRICS, tmp_path / CURVES)
        return kept[-1]

    yield draw
    monkeypatch.undo()
    plt.close("all")


def lines(**curves):
    rows = zip(*curves.values(), strict=True)
    return [{"step": i + 1, **dict(zip(curves, row, strict=True))} for i, row in enumerate(rows)]


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.axison}


def test_the_main_metrics_come_first_and_those_that_never_change_are_words(drawn):
    figure = drawn(lines(other=[1, 2, 3], kl_coef=[0.2] * 3, length=[4, 5, 6], score=[0, 1, 2]))
    assert list(panels(figure)) == ["score", "length", "other"]
    assert figure.get_supxlabel() == "never changes: kl_coef 0.2"


def test_axes_say_what_they_show_without_an_offset(drawn):
    figure = drawn(lines(ratio_mean=[1.0001, 1.0002, 1.00015]))
    (axis,) = panels(figure).values()
    assert axis.get_xlabel() == "step"
    figure.canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == ""


def test_long_noisy_lines_are_pale_below_their_moving_mean(drawn):
    noise = np.random.default_rng(0).normal(0, 1, STEPS)
    figure = drawn(lines(loss=noise.tolist(), learning_rate=np.linspace(0, 1, STEPS).tolist()))
    raw, smooth = panels(figure)["loss"].lines
    assert raw.get_alpha() < 1
    assert np.array_equal(raw.get_ydata(), noise)
    assert np.std(smooth.get_ydata()) < 0.5
    assert len(panels(figure)["learning_rate"].lines) == 1
    assert len(panels(drawn(lines(loss=noise[:50].tolist())))["loss"].lines) == 1


def test_a_moving_mean_is_of_what_there_is_at_the_ends():
    assert metrics.smoothed(np.array([0.0, 3, 6, 9]), 3).tolist() == [1.5, 3, 6, 7.5]


@pytest.mark.parametrize("steps", [1, 2])
def test_trainings_of_hardly_a_step_are_drawn(drawn, steps):
    figure = drawn(lines(loss=[1.0] * steps))
    assert list(panels(figure)) == (["loss"] if steps == 1 else [])


def test_equal_metrics_give_equal_bytes(drawn, tmp_path):
    pictures = set()
    for _ in range(2):
        drawn(lines(loss=np.sin(np.arange(STEPS)).tolist()))
        pictures.add((tmp_path / CURVES).read_bytes())
    assert len(pictures) == 1
