"""Metrics: one line of JSON per step, TensorBoard beside it, and a picture at the end.

`metrics.jsonl` is part of an artefact and holds nothing that differs between equal trainings;
speeds go to TensorBoard and `run.json`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from torch.utils.tensorboard import SummaryWriter

from rlhf import jsonl, parallel

Values = dict[str, float]
NAME = "metrics.jsonl"


class Metrics:
    """Writes the metrics of a training, from rank 0; in other processes it does nothing."""

    def __init__(self, work: Path, tensorboard: Path, done: int) -> None:
        """Continue after step `done`: what was written for later steps is dropped."""
        self.path = work / NAME
        self._silent = parallel.rank() > 0
        if self._silent:
            return
        kept = [line for line in jsonl.read(self.path) if line["step"] <= done] if done else []
        jsonl.write(self.path, kept)
        self._board = SummaryWriter(str(tensorboard), purge_step=done + 1)
        self._clock = time.monotonic()

    def log(self, step: int, values: Values) -> None:
        """Record the metrics of a step."""
        if self._silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(jsonl.line({"step": step, **{k: significant(v) for k, v in values.items()}}))
        now = time.monotonic()
        for name, value in {**values, "seconds": now - self._clock}.items():
            self._board.add_scalar(name, value, step)
        self._clock = now

    def finish(self, out: Path) -> None:
        """Copy the metrics and draw their curves into an artefact."""
        if self._silent:
            return
        self._board.close()
        (out / NAME).write_bytes(self.path.read_bytes())
        draw(self.path, out / "curves.png")


def significant(value: float) -> float:
    """Round to 6 significant digits: enough to read, short enough for a line."""
    return float(f"{value:.6g}")


def draw(metrics: Path, picture: Path) -> None:
    """Draw one small plot per metric over steps."""
    lines = list(jsonl.read(metrics))
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 3 else "", linewidth=1)
        axis.set_title(name, fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=80, metadata={"Software": None})
    plt.close(figure)
