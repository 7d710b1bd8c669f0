"""DeepSpeed's configuration. Numbers come in; none of training stands here."""

from __future__ import annotations

from typing import Any

from rlhf.batch import BatchPlan
from rlhf.config import Run


def ds_config(batch: BatchPlan, dtype: str, max_grad_norm: float, run: Run, hidden: int) -> dict[str, Any]:
    """Return the configuration of an engine that trains a model of `hidden` channels."""
    return {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.grad_accum_steps,
        "gradient_clipping": max_grad_norm,
        **_common(dtype, run.zero_stage, hidden),
    }


def frozen_config(dtype: str, zero_stage: int, hidden: int) -> dict[str, Any]:
    """Return the configuration of an engine that only computes, or that loads a sharded model."""
    return {"train_micro_batch_size_per_gpu": 1, **_common(dtype, zero_stage, hidden)}


def _common(dtype: str, zero_stage: int, hidden: int) -> dict[str, Any]:
    return {
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": _zero(zero_stage, hidden),
        "steps_per_print": 2**31,
    }


def _zero(stage: int, hidden: int) -> dict[str, Any]:
    if stage < 3:
        return {"stage": stage}
    # Biases and norms stay whole: they are smaller than what it costs to gather them.
    return {"stage": 3, "stage3_param_persistence_threshold": 10 * hidden}
