"""Optimizer steps in any number of micro-batches: `launch.py --processes N accumulation.py ACTOR ROWS OUT`.

Rank 0 writes a file: how each step moved the weights, and where a step was refused. Not a test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import trainings

from rlhf import parallel
from rlhf.config import training
from rlhf.config.batch import plan_batch
from rlhf.data.rows import Rows
from rlhf.models import loading, sharding
from rlhf.training import engine, sft
from rlhf.training.wrapped import unwrap

ROWS = 8  # in a batch
ZERO, MICRO_BATCH_SIZES = (0, 1, 2, 3), (4, 2, 1)
# An eps far above every gradient makes a first step of AdamW the gradient, times learning rate / eps.
OPTIMIZER = training.Optimizer(
    learning_rate=1e6,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    eps=1e6,
    max_grad_norm=1e6,
    schedule="constant",
    warmup_steps=0,
    final_ratio=1.0,
)


def engine_of(actor: Path, run: training.TrainingRun) -> Any:
    with engine.loading(actor, "fp32", sharded=run.zero_stage == 3):
        model = loading.load_actor(actor, torch.float32)
    plan = plan_batch(ROWS, run)
    return engine.initialize(model, engine.Recipe(OPTIMIZER, None, plan, steps=1, dtype="fp32", run=run))


def accumulate(trained: Any, rows: list, start: int, size: int) -> None:
    """Add the gradient of the micro-batch that begins at row `start`."""
    task = sft.task(trainings.PAD)
    arranged = task.arrange(rows[start : start + size])
    engine.backward(trained, trained(task.loss, arranged) / task.terms(rows))


def step(actor: Path, rows: list, run: training.TrainingRun) -> dict[str, Any]:
    """Return the gradient's norm, and by how much one step over `rows` moves each weight."""
    trained, size = engine_of(actor, run), run.micro_batch_size
    before = weights(unwrap(trained))
    for start in parallel.own_share(range(0, ROWS, size)):
        accumulate(trained, rows, start, size)
    norm, after = engine.step(trained), weights(unwrap(trained))
    return {"norm": norm, "moved": {name: after[name] - before[name] for name in before}}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return name -> a copy of each whole parameter."""
    with sharding.gathered_parameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_refused(actor: Path, rows: list, run: training.TrainingRun, done: int) -> bool:
    """Return whether a step after `done` micro-batches is refused."""
    trained = engine_of(actor, run)
    for start in range(done):
        accumulate(trained, rows, start, run.micro_batch_size)
    try:
        engine.step(trained)
    except AssertionError:
        return True
    return False


def main() -> None:
    actor, data, out = map(Path, sys.argv[1:])
    processes, rows = int(os.environ["WORLD_SIZE"]), Rows(data / "train")
    batch, runs = [rows[i] for i in range(ROWS)], {}
    for zero in ZERO:
        for size in MICRO_BATCH_SIZES:
            run = {"processes": processes, "zero_stage": zero, "micro_batch_size": size}
            runs[zero, size] = trainings.settings("sft", {"train_batch_size": ROWS, "run": run}).run
    engine.start(runs[0, 1])
    steps = {key: step(actor, batch, run) for key, run in runs.items()}
    refused = [is_refused(actor, batch, runs[0, 1], done) for done in range(ROWS // processes + 1)]
    if parallel.rank() == 0:
        torch.save({"steps": steps, "refused": refused}, out)
    parallel.barrier()


if __name__ == "__main__":
    main()
