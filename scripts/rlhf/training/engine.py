"""DeepSpeed engines: one model with its optimizer and schedule, on every process."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig

from rlhf import parallel
from rlhf.config.batch import BatchPlan
from rlhf.config.training import Lora, Optimizer, Run
from rlhf.errors import DataError, DivergenceError, UserError
from rlhf.models.lora import is_adapter
from rlhf.models.sharding import is_sharded
from rlhf.training.ds_config import ds_config, frozen_config
from rlhf.training.wrapped import FlatForward, SingleForward

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def start(run: Run, dtype: str = "fp32") -> None:
    """Join the other processes, and set the number of threads, on which the last bits of sums depend.

    `launch.py` has set the ranks.

    Raises:
        UserError: there is no GPU but the configuration requires one, the device cannot train in
            `dtype`, or the number of processes is not the configured one.
    """
    if run.gpus and get_accelerator().device_name() == "cpu":
        raise UserError(
            f"run.gpus = {run.gpus}, but torch {torch.__version__} sees no GPU: install torch's CUDA build and a"
            " driver that fits it, or set gpus: 0"
        )
    if not getattr(get_accelerator(), f"is_{dtype}_supported", lambda: True)():
        raise UserError(
            f"dtype = {dtype}: DeepSpeed cannot train in it on {get_accelerator().device_name()};"
            " choose bf16 or fp32"
        )
    torch.set_num_threads(run.threads)
    if get_accelerator().device_name() == "cpu":
        _without_compiler()
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    if parallel.world_size() != run.processes:
        raise UserError(
            f"run.processes = {run.processes}, but {parallel.world_size()} processes were started:"
            f" start it with scripts/launch.py --processes {run.processes}, on every node of NNODES"
        )


def _without_compiler() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: gloo needs no compiler."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder").NAME
    deepspeed.ops.__compatible_ops__[name] = False


def stored_dtype(path: Path) -> str:
    """Return our name for the dtype that a model was saved in.

    Raises:
        DataError: we compute in no such dtype.
    """
    stored = AutoConfig.from_pretrained(path).dtype
    names = {dtype: name for name, dtype in DTYPES.items()}
    if stored not in names:
        raise DataError(f"{path} is saved in {stored}: convert it to one of {', '.join(DTYPES)}")
    return names[stored]


@contextmanager
def loading(path: Path, dtype: str, *, sharded: bool, offloads: bool = False) -> Iterator[None]:
    """Load models within the block; if `sharded`, every process keeps only its shard as weights come in."""
    hidden = AutoConfig.from_pretrained(path).hidden_size
    # transformers shards what it loads while this object is alive.
    sharding = HfDeepSpeedConfig(frozen_config(dtype, hidden, offloads=offloads)) if sharded else None
    try:
        yield
    finally:
        del sharding


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    optimizer: Optimizer
    lora: Lora | None  # whose adapters the model has
    batch: BatchPlan
    steps: int  # optimizer steps of the whole training, which the schedule spans
    dtype: str
    run: Run


def initialize(model: Any, recipe: Recipe) -> Any:
    """Return a DeepSpeed engine around a model, with optimizer and schedule.

    Below ZeRO-2 the model is in a `FlatForward`. From there on gradients are sharded while they come, parameter
    by parameter, and so are offloaded ones.
    """
    optimizer, steps, run = recipe.optimizer, recipe.steps, recipe.run
    if (warmup := warmup_steps(optimizer, steps)) > steps:
        logger.warning(
            "a warm-up of %d steps in a training of %d: the peak learning rate is not reached", warmup, steps
        )
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = _parameter_groups(model, optimizer, recipe.lora)
    is_flat = run.zero_stage < 2 and "optimizer" not in run.offload
    wrapped = FlatForward(model.to(parallel.device()), groups) if is_flat else SingleForward(model)
    adamw = torch.optim.AdamW(
        groups,
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: lr_factor(optimizer, step, steps))
    engine, *_ = deepspeed.initialize(
        model=wrapped.train(),
        optimizer=adamw,
        lr_scheduler=schedule,
        config=ds_config(recipe.batch, recipe.dtype, optimizer.max_grad_norm, run, model.config.hidden_size),
    )
    if isinstance(wrapped, FlatForward):
        wrapped.share_memory_of_parts()
    return engine


def frozen(model: Any, dtype: str, *, offloads: bool = False) -> Any:
    """Return a model that is not trained: whole on each process, or sharded if it was loaded so."""
    wrapped = SingleForward(model.eval().requires_grad_(False))
    if not is_sharded(model):
        return wrapped.to(parallel.device())
    config = frozen_config(dtype, model.config.hidden_size, offloads=offloads)
    engine, *_ = deepspeed.initialize(model=wrapped, config=config)
    engine.eval()
    return engine


def _parameter_groups(model: nn.Module, optimizer: Optimizer, lora: Lora | None) -> list[dict[str, Any]]:
    """Return the optimizer's groups: adapters have their own learning rate, and only matrices decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = [p for name, p in trained.items() if is_adapter(name)]
    others = [p for name, p in trained.items() if not is_adapter(name)]
    decay = optimizer.weight_decay
    groups = [
        {"params": [p for p in others if _dimensions(p) >= 2], "weight_decay": decay},
        {"params": [p for p in others if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    if lora:
        groups = [{"params": adapters, "weight_decay": decay, "lr": lora.learning_rate}, *groups]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: Tensor) -> int:
    """Return the dimensions of the whole parameter: under ZeRO-3 its shards are flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def warmup_steps(optimizer: Optimizer, steps: int) -> int:
    """Return the steps of linear warm-up of a training of `steps`."""
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return round((optimizer.warmup_ratio or 0.0) * steps)


def lr_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate of a step, relative to the peak: linear warm-up, then the schedule."""
    warmup = warmup_steps(optimizer, steps)
    if step < warmup:
        return (step + 1) / warmup
    if optimizer.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optimizer.final_ratio + (1 - optimizer.final_ratio) * shape


def backward(engine: Any, loss: Tensor) -> None:
    """Add the gradient of one micro-batch's loss, a float32 scalar.

    A loss is its micro-batch's part of the mean over the whole batch. The parts' gradients add up to the
    batch's, for any number of micro-batches and processes. DeepSpeed averages over processes; we undo that.
    """
    engine.micro_batch_losses = [*getattr(engine, "micro_batch_losses", []), loss.detach()]
    engine.backward(loss * engine.world_size * _loss_scale(engine), scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # not an optimizer step yet: DeepSpeed counts the micro-batch


def step(engine: Any) -> float:
    """Do one optimizer step with the gradient of all micro-batches; return its norm before clipping.

    In fp16 DeepSpeed skips a step whose scaled gradient overflows, and lowers the scale; the norm is
    0 then. No other step is skipped.

    Raises:
        DivergenceError: a loss or the gradient is not finite.
    """
    # Only now: a look at each loss would make the GPU wait for Python.
    losses, expected = getattr(engine, "micro_batch_losses", []), engine.gradient_accumulation_steps()
    assert len(losses) == expected, f"{len(losses)} of {expected} micro-batches"
    if bad := [loss for loss in torch.stack(losses).tolist() if not math.isfinite(loss)]:
        raise _divergence(f"the loss is {bad[0]}", engine)
    engine.micro_batch_losses = []
    scale = _loss_scale(engine)
    norm = 0.0 if engine.get_global_grad_norm() is not None else _gradient_norm(engine.module)
    engine.step()
    overflow = getattr(engine.optimizer, "overflow", False)  # plain torch optimizers have none
    if overflow and engine.fp16_enabled():
        logger.warning("step %d was skipped: its gradient overflowed in fp16", engine.global_steps)
        return 0.0
    norm = float(engine.get_global_grad_norm() or norm) / scale
    if overflow or not math.isfinite(norm):
        raise _divergence(f"the gradient's norm is {norm}", engine)
    return norm


def _divergence(what: str, engine: Any) -> DivergenceError:
    if engine.global_steps == 0:
        return DivergenceError(
            f"{what} at step 0, before anything was learned: the weights from which the training starts hold NaN"
            " or infinite numbers, or overflow in this dtype; check the model, or train in another dtype"
        )
    other = ", or train in bf16 or fp32" if engine.fp16_enabled() else ""
    return DivergenceError(
        f"{what} at step {engine.global_steps}: the training stops here; lower the learning rate{other}"
    )


def _loss_scale(engine: Any) -> float:
    """Return the factor that a loss needs, and by which the reported norm is too large.

    It differs from 1 only in fp16 under ZeRO 0: there the optimizer divides gradients by its scale, but
    DeepSpeed's `backward` multiplies losses by it for ZeRO's own optimizers alone.
    """
    scaling = getattr(engine.optimizer, "loss_scale_config", None)
    return float(scaling.cur_scale) if scaling else 1.0


def _gradient_norm(model: nn.Module) -> float:
    """Return the norm before clipping; DeepSpeed reports none for an unsharded fp32 engine."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
