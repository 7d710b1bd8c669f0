"""Batch arithmetic: how rows become steps, batches and micro-batches. Pure integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.config import Rlhf, Run, Training


def exact_div(whole: int, part: int, what: str) -> int:
    """Divide, or raise ValueError naming both numbers if a remainder is left."""
    if whole % part:
        raise ValueError(f"{what}: {whole} is not a multiple of {part}")
    return whole // part


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `train_batch_size = micro_batch_size * grad_accum_steps * world_size`."""

    train_batch_size: int
    micro_batch_size: int
    world_size: int
    grad_accum_steps: int


def plan_batch(train_batch_size: int, run: Run) -> BatchPlan:
    """Cut a batch of all processes into micro-batches."""
    per_step = run.micro_batch_size * run.processes
    accumulation = exact_div(train_batch_size, per_step, "train batch over micro-batches")
    return BatchPlan(train_batch_size, run.micro_batch_size, run.processes, accumulation)


def training_steps(config: Training, rows: int) -> int:
    """Optimizer steps of step 1 or 2; an epoch that does not divide is rounded up."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return _ceil(config.epochs * rows / config.train_batch_size)


def rlhf_iterations(config: Rlhf, prompts: int) -> int:
    """Rollouts of step 3; an epoch over the prompts that does not divide is rounded up."""
    if config.iterations is not None:
        return config.iterations
    assert config.epochs is not None
    return _ceil(config.epochs * prompts / config.rollout_batch_size)


def _ceil(steps: float) -> int:
    """Round up, but not for what binary fractions add: 1.1 epochs of 50 steps are 55."""
    return math.ceil(round(steps, 9))
