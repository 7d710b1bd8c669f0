"""The parts of a stage's configuration that say how weights are trained, and how a stage is run.

A half of `config`, which others import.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def _not_a_bool(value: object) -> object:
    """Refuse yes/no where a number belongs: YAML 1.1 makes booleans of many words."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_not_a_bool)]
Float = Annotated[float, BeforeValidator(_not_a_bool)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Dtype = Literal["bf16", "fp16", "fp32"]
Conflict = tuple[tuple[str, ...], str]  # dotted names of fields that do not go together; what to do


def not_one(section: BaseModel, first: str, second: str) -> Iterator[Conflict]:
    """Yield a conflict unless exactly one of two fields is given."""
    if (getattr(section, first) is None) == (getattr(section, second) is None):
        yield (first, second), f"give either {first} or {second} (the other one: null)"


def multiples(value: int, step: int) -> str:
    """Return the multiples of `step` beside `value`, in words."""
    below, above = value // step * step, math.ceil(value / step) * step
    return f"{below} or {above}" if below else str(above)


class Section(BaseModel):
    """Frozen; unknown fields, NaN and infinities are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """Yield fields that are right one by one and do not go together."""
        yield from ()

    @model_validator(mode="after")
    def _without_conflicts(self) -> Section:
        lines = [
            InitErrorDetails(
                type=PydanticCustomError("conflict", "{message}", {"message": message, "fields": fields}),
                input=None,
            )
            for fields, message in self.conflicts()
        ]
        if lines:  # pydantic puts each in its place among the mistakes of the whole
            raise ValidationError.from_exception_data(type(self).__name__, lines)
        return self


class Optimizer(Section):
    """AdamW with a schedule over optimizer steps."""

    learning_rate: Float = Field(ge=0, description="peak learning rate")
    weight_decay: Float = Field(ge=0, description="decoupled, on matrices only")
    betas: tuple[Beta, Beta] = Field(description="Adam's moment decay rates: a list of two")
    eps: Float = Field(gt=0, description="Adam's denominator term")
    max_grad_norm: Float = Field(gt=0, description="global gradient norm is clipped to this")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="shape after warm-up")
    warmup_steps: Int | None = Field(None, ge=0, description="optimizer steps of linear warm-up")
    warmup_ratio: Float | None = Field(None, ge=0, lt=1, description="the same as a part of all steps")
    final_ratio: Float = Field(ge=0, le=1, description="last learning rate / peak")

    def conflicts(self) -> Iterator[Conflict]:
        yield from not_one(self, "warmup_steps", "warmup_ratio")


class Lora(Section):
    """Low-rank adapters instead of the weights of linear layers."""

    dim: Int = Field(ge=1, description="rank of the adapters")
    alpha: Float = Field(gt=0, description="adapters are scaled by alpha / dim")
    learning_rate: Float = Field(gt=0, description="peak learning rate of the adapters")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of linear layers; null: all of a layer, by family"
    )
    only: bool = Field(
        True,
        description="train adapters alone (and a reward model's head); else biases, norms, embeddings too",
    )


class Run(Section):
    """How a stage runs. Nothing here changes what it makes, but for rounding."""

    nodes: Int = Field(ge=1, description="machines, or pods of a cluster job")
    gpus: Int = Field(ge=0, description="GPUs per node; 0 trains on the CPU")
    processes: Int = Field(ge=1, description="processes of all nodes together, one per GPU")
    zero_stage: Int = Field(ge=0, le=3, description="DeepSpeed's: what the processes share out, 0 nothing")
    micro_batch_size: Int = Field(ge=1, description="sequences or pairs per process and forward")
    threads: Int = Field(ge=1, description="intra-op threads of torch; changes the last bits")
    save_steps: Int = Field(ge=1, description="steps between saved training states")
    log_steps: Int = Field(
        ge=1, description="steps (step 3: iterations) between updates of the progress bar's figures"
    )
    mem_mb: Int = Field(ge=1, description="memory per node in MB")
    shm_mb: Int = Field(ge=1, description="shared memory (/dev/shm) in MB, a part of mem_mb; NCCL needs it")
    runtime: Int = Field(ge=1, description="limit in minutes")
    gradient_checkpointing: bool = Field(description="compute activations twice instead of keeping them")
    offload: tuple[Literal["optimizer", "parameters"], ...] = Field(description="what lies in CPU memory")

    def conflicts(self) -> Iterator[Conflict]:
        wanted = self.nodes * self.gpus or self.processes
        if self.processes != wanted or self.processes % self.nodes:
            why = "each GPU has one process" if self.gpus else "each node has as many processes"
            fits = wanted if self.gpus else multiples(self.processes, self.nodes)
            yield ("processes", "nodes", "gpus"), f"{why}: choose processes {fits}"
        for what, least in (("optimizer", 1), ("parameters", 3)):
            if what in self.offload and self.zero_stage < least:
                yield (
                    ("offload", "zero_stage"),
                    f"offload of {what} needs zero_stage {least} or more: DeepSpeed offloads what it shares out",
                )

    @property
    def cores(self) -> int:
        """CPU cores that its processes keep busy."""
        return self.processes * self.threads

    @property
    def cores_per_node(self) -> int:
        """CPU cores that its processes on one node keep busy."""
        return self.cores // self.nodes

    @property
    def cut(self) -> dict[str, int]:
        """What a saved training state depends on: it holds shards."""
        return {"processes": self.processes, "zero_stage": self.zero_stage}


def fp16_without_gpus(dtype: Dtype, run: Run) -> Iterator[Conflict]:
    """Yield a conflict of a stage's dtype with where it runs."""
    if dtype == "fp16" and not run.gpus:
        yield ("dtype", "run.gpus"), "fp16 is trained on GPUs only: choose bf16 or fp32, or gpus above 0"


class TrainingRun(Run):
    """How steps 1 and 2 run."""

    packing: bool = Field(description="rows packed one after another; false: padded to the longest")


class RlhfRun(Run):
    """How step 3 runs."""

    generation_batch_size: Int = Field(ge=1, description="replies that a process samples at a time")
    inference_tp_size: Int = Field(
        ge=1, description="processes that share one copy of the actor to sample; 1: a copy each"
    )
    offload: tuple[Literal["optimizer", "parameters", "reference"], ...] = Field(  # type: ignore[assignment]
        description="what lies in CPU memory"
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        size, per_node = self.inference_tp_size, self.processes // self.nodes
        if size > 1 and self.zero_stage < 3:
            yield (
                ("inference_tp_size", "zero_stage"),
                "below zero_stage 3 every process has the whole actor in any case: choose inference_tp_size 1",
            )
        if per_node % size:
            fits = ", ".join(str(n) for n in range(1, per_node + 1) if per_node % n == 0)
            yield (
                ("inference_tp_size", "processes", "nodes"),
                f"copies are shared among the {per_node} processes of a node: choose inference_tp_size from {fits}",
            )
