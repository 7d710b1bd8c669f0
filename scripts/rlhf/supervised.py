"""The training loop of steps 1 and 2: rows in, one loss down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf import engine, lora, order, packing, parallel
from rlhf.batch import plan_batch, training_steps
from rlhf.config import Training
from rlhf.metrics import Metrics, Values, significant
from rlhf.models import evaluating
from rlhf.progress import progress
from rlhf.rows import Ids, Rows
from rlhf.state import State
from rlhf.streams import Purpose, seed_of
from rlhf.tokens import Packed, Padded

Batch = Sequence[list[Ids]]

logger = logging.getLogger(__name__)

MANY_PASSES = 20  # over the same rows, more than which is a mistake more often than not


@dataclass(frozen=True)
class Task:
    """What is learned, and what it is called. Functions of a model get a bare one.

    `loss(model, rows)` is a sum over `terms(rows)` terms; their mean over a whole batch is trained.
    `measure(model, rows)` returns sums over held-out rows, by the names in `sums`; `figures(sums)`
    turns the totals over all rows into the reported metrics. Both get rows packed to `pack_width` tokens, or
    padded without it.
    """

    name: str
    terms: Callable[[Batch], int]
    loss: Callable[[Any, Batch], Tensor]
    sums: tuple[str, ...]
    measure: Callable[[Any, Batch], Values]
    figures: Callable[[Values], Values]
    pack_width: int | None


def train(
    task: Task, model: Any, config: Training, seed: int, data: Path, work: Path, board: Path
) -> tuple[Values, Metrics]:
    """Train `model` in place, from the newest state in `work` if there is one.

    Returns:
        the last measurement on held-out rows, and the metrics of all steps.
    """
    run = config.run
    state = State(work, run.cut)
    state.lock()
    rows, held_out = Rows(data / "train"), Rows(data / "eval")
    batch, steps = plan_batch(config.train_batch_size, run), training_steps(config, len(rows))
    if (passes := steps * batch.train_batch_size / len(rows)) > MANY_PASSES:
        logger.warning(
            "%s passes %.0f times over %d rows: bring more rows, or train for fewer steps",
            task.name,
            passes,
            len(rows),
        )
    if config.lora:
        lora.add(model, config.lora, seed_of(seed, Purpose.LORA))
    if task.pack_width is not None:
        packing.choose(model, config.dtype)
    trained = engine.initialise(model, config.optimizer, config.lora, batch, config.dtype, steps, run)
    state.engines["model"] = trained
    done, _ = state.load() or (0, {})
    metrics, lengths = Metrics(work, board, done), rows.tokens_per_row
    for step in (bar := progress(range(done, steps), task.name, unit="step", start=done, total=steps)):
        chosen = [rows[int(i)] for i in order.batch(lengths, batch.train_batch_size, step, steps, seed)]
        values = _step(task, trained, chosen, batch.micro_batch_size)
        metrics.log(step + 1, values)
        if (step + 1) % run.log_steps == 0:
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
        if (step + 1) % run.save_steps == 0 or step + 1 == steps:
            state.save(step + 1, {})
    sample = [held_out[i] for i in range(min(config.eval_rows, len(held_out)))]
    with evaluating(trained.module):
        measured = measure(task, trained, sample, run.micro_batch_size)
    return {name: significant(value) for name, value in measured.items()}, metrics


def _step(task: Task, trained: Any, rows: Batch, micro_batch_size: int) -> Values:
    """Do one optimizer step over all processes; return its metrics."""
    terms, mine = task.terms(rows), 0.0
    learning_rate = trained.get_lr()[0]
    starts = parallel.own(range(0, len(rows), micro_batch_size))

    def losses() -> Iterator[Tensor]:
        nonlocal mine
        for start in starts:
            loss = trained(task.loss, rows[start : start + micro_batch_size]) / terms
            mine += loss.item()
            yield loss

    grad_norm = engine.optimise(trained, losses())
    return {**parallel.total({"loss": mine}), "grad_norm": grad_norm, "learning_rate": learning_rate}


def measure(task: Task, trained: Any, rows: Batch, micro_batch_size: int) -> Values:
    """Return what a model does on held-out rows. Processes share the micro-batches.

    Under ZeRO-3 every process must compute as often as the others: one that has no batch left
    repeats the last and does not count it.
    """
    batches, sums = list(in_batches(rows, micro_batch_size)), dict.fromkeys(task.sums, 0.0)
    for first in range(0, len(batches), parallel.world_size()):
        number = first + parallel.rank()
        counts = number < len(batches)
        found = trained(task.measure, batches[min(number, len(batches) - 1)])
        for name, value in found.items():
            sums[name] += counts * value
    return {**task.figures(parallel.total(sums)), "eval_rows": len(rows)}


def in_batches(rows: Batch, size: int) -> Iterator[Batch]:
    """Yield rows in batches of like length, for measuring."""
    ordered = sorted(rows, key=lambda row: sum(map(len, row)))
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


def on_device(batch: Padded | Packed) -> Padded | Packed:
    """Return a batch on this process's device."""
    return batch.to(parallel.device())
