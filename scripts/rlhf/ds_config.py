"""DeepSpeed's configuration. Numbers come in; none stands here."""

from __future__ import annotations

from typing import Any

from rlhf.batch import BatchPlan


def ds_config(batch: BatchPlan, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """Return the configuration of one engine."""
    return {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.grad_accum_steps,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 0},
        "steps_per_print": 2**31,
    }
