"""Batch arithmetic in plain integers: from rows to steps, batches and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config.stages import Rlhf, Training
from rlhf.config.training import Run


def exact_div(total: int, size: int, what: str) -> int:
    """Return `total / size`.

    Raises:
        ValueError: there is a remainder; the text names `what` and both numbers.
    """
    if total % size:
        raise ValueError(f"{what}: {total} is not a multiple of {size}")
    return total // size


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `train_batch_size = micro_batch_size * grad_accum_steps * world_size`."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int
    grad_accum_steps: int


def plan_batch(train_batch_size: int, run: Run) -> BatchPlan:
    """Return how a batch of all processes is divided into micro-batches.

    Raises:
        ValueError: it is not a multiple of micro-batch size x processes.
    """
    per_step = run.micro_rows * run.processes
    accumulation = exact_div(train_batch_size, per_step, "train batch over micro-batches")
    return BatchPlan(train_batch_size, run.micro_rows, run.processes, accumulation)


def training_steps(config: Training, rows: int) -> int:
    """Return the optimizer steps of the SFT or reward stage; a last batch that is not full counts."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return _ceil(config.epochs * rows / config.train_batch_size)


def rlhf_iterations(config: Rlhf, prompts: int) -> int:
    """Return the rollouts of the PPO stage; a last rollout that is not full counts."""
    if config.iterations is not None:
        return config.iterations
    assert config.epochs is not None
    return _ceil(config.epochs * prompts / config.rollout_batch_size)


def _ceil(steps: float) -> int:
    """Round up, but ignore the error of binary fractions: 1.1 epochs of 50 steps are 55."""
    return math.ceil(round(steps, 9))


def slices(rows: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` rows that cover `rows`; the last may be shorter."""
    return (slice(start, start + size) for start in range(0, rows, size))
