"""The settings that stages share: optimizer, adapters, and how a stage is executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.section import Conflict, Float, Int, Section, multiples, not_one

Beta = Annotated[Float, Field(ge=0, lt=1)]
Dtype = Literal["bf16", "fp16", "fp32"]
Count = Annotated[Int, Field(ge=1)]
Auto = Literal["auto"]  # decided when the training starts, by `training.fit`


class Optimizer(Section):
    """AdamW with a schedule over optimizer steps."""

    learning_rate: Float = Field(ge=0, description="peak learning rate")
    weight_decay: Float = Field(ge=0, description="decoupled, on matrices only")
    betas: tuple[Beta, Beta] = Field(description="Adam's moment decay rates: a list of two")
    eps: Float = Field(gt=0, description="Adam's denominator term")
    max_grad_norm: Float = Field(gt=0, description="global gradient norm is clipped to this")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="shape after warm-up")
    warmup_steps: Int | None = Field(None, ge=0, description="optimizer steps of linear warm-up")
    warmup_ratio: Float | None = Field(None, ge=0, lt=1, description="warm-up as a share of all steps")
    final_ratio: Float = Field(ge=0, le=1, description="last learning rate / peak learning rate")

    def conflicts(self) -> Iterator[Conflict]:
        yield from not_one(self, "warmup_steps", "warmup_ratio")


class Lora(Section):
    """Low-rank adapters instead of the weights of linear layers."""

    dim: Int = Field(ge=1, description="rank of the adapters")
    alpha: Float = Field(gt=0, description="adapters are scaled by alpha / dim")
    learning_rate: Float = Field(gt=0, description="peak learning rate of the adapters")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of linear layers; null: all of a decoder layer, by family"
    )
    only: bool = Field(
        True,
        description="train only adapters (and a reward model's head); false: biases, norms, embeddings too",
    )


class Run(Section):
    """How a stage is executed. Nothing here changes the result, except through rounding."""

    nodes: Int = Field(ge=1, description="machines, or pods of a cluster job")
    gpus: Int = Field(ge=0, description="GPUs per node; 0 trains on the CPU")
    processes: Int = Field(ge=1, description="processes of all nodes together, one per GPU")
    zero_stage: Int = Field(
        ge=0,
        le=3,
        description="DeepSpeed's: shard 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too",
    )
    micro_batch_size: Count | Auto = Field(
        description="sequences or pairs per process and forward; auto: as many as memory allows"
    )
    threads: Int = Field(ge=1, description="intra-op threads of torch; changes the last bits")
    save_steps: Int = Field(ge=1, description="steps between saved training states")
    log_steps: Int = Field(
        ge=1, description="steps (PPO: iterations) between updates of the progress bar's metrics"
    )
    mem_mb: Int = Field(ge=1, description="memory per node in MB")
    shm_mb: Int = Field(ge=1, description="shared memory (/dev/shm) in MB, a part of mem_mb; NCCL needs it")
    runtime: Int = Field(ge=1, description="limit in minutes")
    gradient_checkpointing: bool | Auto = Field(
        description="recompute activations instead of keeping them; auto: only if memory requires it"
    )
    offload: tuple[Literal["optimizer", "parameters"], ...] = Field(description="what is kept in CPU memory")

    def conflicts(self) -> Iterator[Conflict]:
        expected = self.nodes * self.gpus or self.processes
        if self.processes != expected or self.processes % self.nodes:
            rule = "each GPU has one process" if self.gpus else "all nodes have equally many processes"
            choice = expected if self.gpus else multiples(self.processes, self.nodes)
            yield ("processes", "nodes", "gpus"), f"{rule}: choose processes {choice}"
        for what, least in (("optimizer", 1), ("parameters", 3)):
            if what in self.offload and self.zero_stage < least:
                yield (
                    ("offload", "zero_stage"),
                    f"offload of {what} needs zero_stage {least} or more: DeepSpeed offloads only what it shards",
                )

    @property
    def least_rows(self) -> int:
        """The fewest rows that all processes read in one forward: a batch is a multiple of it."""
        return (1 if self.micro_batch_size == "auto" else self.micro_batch_size) * self.processes

    @property
    def micro_rows(self) -> int:
        """`micro_batch_size`, once it is decided."""
        assert self.micro_batch_size != "auto", "training.fit decides it first"
        return self.micro_batch_size

    @property
    def cores(self) -> int:
        """CPU cores of all processes together."""
        return self.processes * self.threads

    @property
    def cores_per_node(self) -> int:
        """CPU cores of the processes of one node."""
        return self.cores // self.nodes

    @property
    def shard_layout(self) -> dict[str, int]:
        """How a saved training state is sharded: a state with another layout cannot be loaded."""
        return {"processes": self.processes, "zero_stage": self.zero_stage}


def fp16_without_gpus(dtype: Dtype, run: Run) -> Iterator[Conflict]:
    """Yield a conflict if a stage trains in fp16 on CPUs."""
    if dtype == "fp16" and not run.gpus:
        yield ("dtype", "run.gpus"), "fp16 is trained on GPUs only: choose bf16 or fp32, or gpus above 0"


class TrainingRun(Run):
    """How the SFT and reward stages are executed."""

    packing: bool = Field(description="several sequences share a row; false: each is padded to the longest")


class RlhfRun(Run):
    """How the PPO stage and the comparison are executed."""

    generation_batch_size: Count | Auto = Field(
        description="responses that a process samples at a time; auto: as many as memory allows"
    )
    inference_tp_size: Int = Field(
        ge=1, description="processes that share one copy of the actor for sampling; 1: each has its own"
    )
    offload: tuple[Literal["optimizer", "parameters", "reference"], ...] = Field(  # type: ignore[assignment]
        description="what is kept in CPU memory"
    )

    @property
    def generation_rows(self) -> int:
        """`generation_batch_size`, once it is decided."""
        assert self.generation_batch_size != "auto", "training.fit decides it first"
        return self.generation_batch_size

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        size, per_node = self.inference_tp_size, self.processes // self.nodes
        if size > 1 and self.zero_stage < 3:
            yield (
                ("inference_tp_size", "zero_stage"),
                "below zero_stage 3 every process has the whole actor already: choose inference_tp_size 1",
            )
        if per_node % size:
            divisors = ", ".join(str(n) for n in range(1, per_node + 1) if per_node % n == 0)
            yield (
                ("inference_tp_size", "processes", "nodes"),
                f"a copy is shared among the {per_node} processes of a node: choose inference_tp_size from"
                f" {divisors}",
            )
