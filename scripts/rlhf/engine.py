"""DeepSpeed engines: one model with its optimizer and schedule, on every process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from rlhf.batch import BatchPlan
from rlhf.config import Optimizer
from rlhf.ds_config import ds_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start(threads: int) -> None:
    """Join the other processes; fix what decides the last bits. `launch.py` set the ranks."""
    torch.set_num_threads(threads)
    if get_accelerator().device_name() == "cpu":
        _without_compiler()
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)


def _without_compiler() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: gloo needs none."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder").NAME
    deepspeed.ops.__compatible_ops__[name] = False


def device() -> torch.device:
    """Return this process's device."""
    return torch.device(get_accelerator().current_device_name())


def initialise(model: nn.Module, optimizer: Optimizer, batch: BatchPlan, dtype: str, steps: int) -> Any:
    """Return a DeepSpeed engine around `model`.

    Args:
        steps: optimizer steps of the whole training, which the schedule spans.
    """
    adamw = torch.optim.AdamW(
        _groups(model, optimizer.weight_decay), lr=optimizer.learning_rate,
        betas=optimizer.betas, eps=optimizer.eps,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: lr_factor(optimizer, step, steps))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw, lr_scheduler=schedule,
        config=ds_config(batch, dtype, optimizer.max_grad_norm),
    )  # fmt: skip
    return engine


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: neither biases nor norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def lr_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate of a step over the peak: warm-up from 1/n, then the schedule."""
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    done = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    shape = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optimizer.final_ratio + (1 - optimizer.final_ratio) * shape


def optimise(engine: Any, losses: Iterable[Tensor]) -> float:
    """Do one optimizer step over the micro-batches' losses; return the gradient norm.

    Each loss is its micro-batch's part of the mean over the whole batch: parts add up, so that any
    number of micro-batches gives one gradient. DeepSpeed averages over processes; we undo that.

    Raises:
        FloatingPointError: a loss or the gradient is not finite. No batch is skipped.
    """
    norm = 0.0
    for loss in losses:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {engine.global_steps}")
        engine.backward(loss * engine.world_size, scale_wrt_gas=False)
        norm = _gradient_norm(engine.module)
        engine.step()
    norm = float(engine.get_global_grad_norm() or norm)
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm} at step {engine.global_steps}")
    return norm


def _gradient_norm(model: nn.Module) -> float:
    """Return the norm before clipping; DeepSpeed reports none for an unsharded fp32 engine."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
