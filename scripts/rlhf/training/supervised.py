"""The training loop of the SFT and reward stages, which differ only in their `Task`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlhf import parallel
from rlhf.config.batch import BatchPlan, plan_batch, training_steps
from rlhf.config.stages import Training
from rlhf.data import order
from rlhf.data.ahead import ahead
from rlhf.data.rows import Ids, Rows
from rlhf.data.streams import Purpose, seed_of
from rlhf.models import lora, packing
from rlhf.models.graphs import use_graphs
from rlhf.models.outputs import evaluating
from rlhf.progress import progress
from rlhf.store.layout import EVAL, TRAIN
from rlhf.training import engine, fit
from rlhf.training.metrics import Metrics, MetricsLog, Trained, significant
from rlhf.training.paths import Paths
from rlhf.training.state import State
from rlhf.training.stopping import StopRequest, stopped

Batch = Sequence[list[Ids]]  # rows; each is a list with its parts: token ids, (tokens,) int32

logger = logging.getLogger(__name__)

MANY_PASSES = 20  # over the same rows; more of them are usually a mistake


@dataclass(frozen=True)
class Task:
    """What a stage learns. Its functions get the Hugging Face model, not the engine around it.

    `arrange(rows)` is what the others read of a micro-batch, on the CPU. `loss(model, arranged)` is a float32
    scalar, the sum of `terms(rows)` terms; training minimises their mean over a whole batch.
    `measure(model, arranged)` returns sums over held-out rows, by the names in `sums`, and `figures(sums)`
    turns their totals into the reported metrics. Rows are packed to `pack_width` tokens, or padded if it is
    None.
    """

    name: str
    terms: Callable[[Batch], int]
    arrange: Callable[[Batch], Any]
    loss: Callable[[Any, Any], Tensor]
    sums: tuple[str, ...]
    measure: Callable[[Any, Any], Metrics]
    figures: Callable[[Metrics], Metrics]
    pack_width: int | None


@dataclass(frozen=True)
class Step:
    """What one optimizer step reads."""

    rows: int
    tokens: int  # that the model reads
    terms: int  # of the loss
    micro_batches: Sequence[Any]  # this process's, arranged


def train(task: Task, model: Any, config: Training, seed: int, paths: Paths) -> Trained:
    """Train a Hugging Face model in place, from the newest state in `paths.work` if there is one.

    Returns:
        the metrics on held-out rows at the end, and the log of all steps.

    Raises:
        DataError: LoRA's targets match no layer.
        DivergenceError: a loss or gradient is not finite.
        Stopped: SIGTERM came; the state is saved.
        UserError: another process trains the same artefact, or the state does not fit the configuration.
    """
    state = State(paths.work, config.run.shard_layout)
    state.lock()
    rows, held_out = Rows(paths.data / TRAIN), Rows(paths.data / EVAL)
    read = _tokens_read(rows.tokens_per_part)
    if config.lora:
        lora.add(model, config.lora, seed_of(seed, Purpose.LORA))
    config = fit.fitted_training(model, config, int(read.max()), float(read.mean()))
    run = config.run
    batch, steps = plan_batch(config.train_batch_size, run), training_steps(config, len(rows))
    _warn_of_many_passes(task.name, steps * batch.train_batch_size, len(rows))
    trained = _start(task, model, config, batch, steps)
    state.engines["model"] = trained
    done, _ = state.load() or (0, {})
    log, lengths = MetricsLog(paths.work, paths.board, done), rows.tokens_per_row

    def arranged(step: int) -> Step:
        numbers = order.batch(lengths, batch.train_batch_size, step, steps, seed)
        chosen, size = [rows[int(i)] for i in numbers], batch.micro_batch_size
        starts = parallel.own_share(range(0, len(chosen), size))
        parts = [task.arrange(chosen[start : start + size]) for start in starts]
        return Step(len(chosen), int(read[numbers].sum()), task.terms(chosen), parts)

    bar = progress(range(done, steps), task.name, unit="step", start=done, total=steps)
    with StopRequest() as request:
        for step, content in zip(bar, ahead(arranged, range(done, steps)), strict=True):
            metrics = _step(task, trained, content)
            log.log(step + 1, metrics, content.rows, content.tokens)
            if (step + 1) % run.log_steps == 0:
                bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
            stops = request.is_agreed()
            if (step + 1) % run.save_steps == 0 or step + 1 == steps or stops:
                state.save(step + 1, {})
            if stops:
                raise stopped(step + 1)
    sample = [held_out[i] for i in range(min(config.eval_rows, len(held_out)))]
    with evaluating(trained.module):
        measured = measure(task, trained, sample, run.micro_rows)
    return Trained({name: significant(value) for name, value in measured.items()}, log, run)


def _warn_of_many_passes(name: str, rows_seen: int, rows: int) -> None:
    if (passes := rows_seen / rows) > MANY_PASSES:
        logger.warning(
            "%s passes %.0f times over %d rows: add rows, or train for fewer steps", name, passes, rows
        )


def _tokens_read(per_part: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N,) tokens that a model reads of each row; each response of a pair is read after the prompt.

    Args:
        per_part: (N, parts), the prompt first.
    """
    again = (per_part.shape[1] - 2) * per_part[:, 0]
    return np.asarray(per_part.sum(1) + again)


def _start(task: Task, model: Any, config: Training, batch: BatchPlan, steps: int) -> Any:
    """Return an engine around a model with its adapters, after choosing the attention of packed rows."""
    if task.pack_width is not None:
        packing.choose_attention(model, config.dtype)
    recipe = engine.Recipe(config.optimizer, config.lora, batch, steps, config.dtype, config.run)
    trained = engine.initialize(model, recipe)
    use_graphs(model)  # now that parameters are where they stay
    return trained


def _step(task: Task, trained: Any, content: Step) -> Metrics:
    """Do one optimizer step over all processes; return its metrics."""
    losses, learning_rate = list[Tensor](), trained.get_lr()[0]
    for arranged in content.micro_batches:
        loss = trained(task.loss, arranged) / content.terms
        losses.append(loss.detach())
        engine.backward(trained, loss)
    grad_norm, loss_sum = engine.step(trained), sum(loss.item() for loss in losses)
    return {**parallel.all_sum({"loss": loss_sum}), "grad_norm": grad_norm, "learning_rate": learning_rate}


def measure(task: Task, trained: Any, rows: Batch, micro_batch_size: int) -> Metrics:
    """Return the metrics of a model on held-out rows. Processes share the micro-batches.

    Under ZeRO-3 every process must compute as often as the others: one that has no batch left
    repeats the last and does not count it.

    Args:
        trained: the model, wrapped by `engine`.
        rows: token ids of each part of each row, of shape (tokens,) and int32.
    """
    batches, sums = list(in_batches(rows, micro_batch_size)), dict.fromkeys(task.sums, 0.0)
    for first in range(0, len(batches), parallel.world_size()):
        number = first + parallel.rank()
        counts = number < len(batches)
        found = trained(task.measure, task.arrange(batches[min(number, len(batches) - 1)]))
        for name, value in found.items():
            sums[name] += counts * value
    return {**task.figures(parallel.all_sum(sums)), "eval_rows": len(rows)}


def in_batches(rows: Batch, size: int) -> Iterator[Batch]:
    """Yield rows, sorted by length, in batches of `size`; the last may be smaller."""
    ordered = sorted(rows, key=lambda row: sum(map(len, row)))
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))
