"""DeepSpeed's configuration, from numbers that are decided elsewhere."""

from __future__ import annotations

from typing import Any

from rlhf.config.batch import BatchPlan
from rlhf.config.training import Run

CPU = {"device": "cpu"}


def ds_config(batch: BatchPlan, dtype: str, max_grad_norm: float, run: Run, hidden: int) -> dict[str, Any]:
    """Return the configuration of an engine that trains a model of hidden size `hidden`."""
    zero = _zero(run.zero_stage, hidden, offloads="parameters" in run.offload)
    if "optimizer" in run.offload:
        zero["offload_optimizer"] = CPU
    return {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.grad_accum_steps,
        "gradient_clipping": max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU without a compiler
        **_common(dtype, zero),
        **_reductions(dtype, run.zero_stage),
    }


def frozen_config(dtype: str, hidden: int, *, offloads: bool = False) -> dict[str, Any]:
    """Return the configuration for loading a sharded model, and for one that is not trained."""
    zero = _zero(3, hidden, offloads=offloads)
    return {"train_micro_batch_size_per_gpu": 1, **_common(dtype, zero)}


def _common(dtype: str, zero: dict[str, Any]) -> dict[str, Any]:
    half = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    return {**half, "zero_optimization": zero, "steps_per_print": 2**31}


def _zero(stage: int, hidden: int, *, offloads: bool) -> dict[str, Any]:
    if stage < 3:
        return {"stage": stage}
    # Biases and norms are not sharded: gathering them costs more time than keeping them costs memory.
    whole = {"stage": 3, "stage3_param_persistence_threshold": 10 * hidden}
    return whole | ({"offload_param": CPU} if offloads else {})


def _reductions(dtype: str, stage: int) -> dict[str, Any]:
    """Sum 16-bit gradients in 32 bits: over processes, and over micro-batches where DeepSpeed can."""
    if dtype == "fp32":
        return {}
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}
    return {"communication_data_type": "fp32", **accumulation}
