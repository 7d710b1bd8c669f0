"""Metrics: one line of JSON per step, TensorBoard beside it, and a picture at the end.

`metrics.jsonl` is part of an artefact and holds nothing that differs between equal trainings;
speeds go to TensorBoard and `run.json`.
"""

from __future__ import annotations

import math
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from torch.utils.tensorboard import SummaryWriter

from rlhf import jsonl, parallel
from rlhf.config.training import Run
from rlhf.models.ema import Ema
from rlhf.store.layout import CURVES, METRICS
from rlhf.training.metric_names import MAIN

Metrics = dict[str, float]  # name -> value
MANY = 100  # a noisy curve of more points is smoothed


@dataclass(frozen=True)
class Trained:
    """What a training leaves beside its weights."""

    metrics: Metrics  # at its end; other ranks than 0 may have none
    log: MetricsLog
    run: Run  # with its `auto`s decided
    ema: Ema | None = None


class MetricsLog:
    """Writes the metrics of a training, from rank 0; in other processes it does nothing."""

    def __init__(self, work: Path, tensorboard: Path, done: int) -> None:
        """Continue after step `done`: keep the lines of `metrics.jsonl` up to it, and drop later ones."""
        self.path = work / METRICS
        self._speeds: list[Metrics] = []
        self._silent = parallel.rank() > 0
        if self._silent:
            return
        kept = [line for line in jsonl.read(self.path) if line["step"] <= done] if done else []
        jsonl.write(self.path, kept)
        self._board = SummaryWriter(str(tensorboard), purge_step=done + 1)
        self._clock = time.monotonic()

    def log(self, step: int, metrics: Metrics, samples: int, tokens: int) -> None:
        """Record the metrics of a step, and how long it took for its samples and their tokens."""
        if self._silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(jsonl.line({"step": step, **{k: significant(v) for k, v in metrics.items()}}))
        now = time.monotonic()
        seconds = now - self._clock
        self._clock = now
        speed = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
        }
        self._speeds.append(speed)
        for name, value in {**metrics, **speed}.items():
            self._board.add_scalar(name, value, step)

    def speed(self) -> Metrics:
        """Return the median seconds, samples and tokens per second of a step since this start, and the peak memory.

        Peak memory is that of tensors on this process's GPU, in GiB.
        """
        if not self._speeds:
            return {}
        medians = {name: float(np.median([s[name] for s in self._speeds])) for name in self._speeds[0]}
        if torch.cuda.is_available():
            medians["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return {name: significant(value) for name, value in medians.items()}

    def finish(self, out: Path) -> None:
        """Copy the metrics and draw their curves into an artefact."""
        if self._silent:
            return
        self._board.close()
        (out / METRICS).write_bytes(self.path.read_bytes())
        draw(self.path, out / CURVES)


def significant(value: float) -> float:
    """Round to 6 significant digits: enough to read, short enough for a line."""
    return float(f"{value:.6g}")


def draw(metrics: Path, picture: Path) -> None:
    """Draw one small plot per metric over steps, the main ones first; constants are listed below."""
    curves = _curves(metrics)
    fixed = {name: y[0] for name, (_, y) in curves.items() if len(y) > 1 and np.ptp(y) == 0}
    names = [name for name in curves if name not in fixed]
    columns = max(1, min(4, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        _plot(axis, *curves[name])
        axis.set_title(name, fontsize=9)
    if fixed:
        listed = ", ".join(f"{name} {value:g}" for name, value in fixed.items())
        figure.supxlabel(textwrap.fill(f"never changes: {listed}", 50 * columns), fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _curves(metrics: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return name -> steps and values, in the order in which they are drawn."""
    lines = list(jsonl.read(metrics))
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    names.sort(key=lambda name: MAIN.index(name) if name in MAIN else len(MAIN))
    having = {name: [line for line in lines if name in line] for name in names}
    return {
        n: (np.array([k["step"] for k in some]), np.array([k[n] for k in some])) for n, some in having.items()
    }


def _plot(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    noisy = len(values) > MANY and np.abs(np.diff(values)).sum() > 5 * np.ptp(values)
    axis.plot(
        steps, values, "C0", marker="." if len(values) < 3 else "", linewidth=1, alpha=0.3 if noisy else 1
    )
    if noisy:
        axis.plot(steps, smoothed(values, len(values) // 20), "C0", linewidth=1.5)
    axis.set_xlabel("step", fontsize=8)
    axis.ticklabel_format(useOffset=False)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return (N,) float64: the mean of `width` values around each of (N,) values; of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
