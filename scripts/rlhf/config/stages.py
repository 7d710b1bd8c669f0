"""The configuration of each stage: its data, length and hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field

from rlhf.config import reference
from rlhf.config.section import Conflict, Float, Int, Section, multiples, not_one
from rlhf.config.sources import Dataset, Datasets, Model
from rlhf.config.training import Dtype, Lora, Optimizer, RlhfRun, TrainingRun, fp16_without_gpus

Stage = Literal["sft", "reward", "rlhf"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Shares(Section):
    """How the rows for training are divided: a stage gets its share / the sum of all shares."""

    sft: Float = Field(gt=0, description="share of the SFT stage")
    reward: Float = Field(gt=0, description="share of the reward stage")
    rlhf: Float = Field(gt=0, description="share of the PPO stage")


class Data(Section):
    """How rows are divided between the stages and the held-out rows."""

    shares: Shares
    eval_share: Float = Field(gt=0, lt=1, description="share of all groups that no stage trains on")


class Preparation(Section):
    """How the tokenised rows of one stage are prepared."""

    stage: Stage
    max_tokens: Int = Field(ge=1, description="longest prompt with one response; longer rows are dropped")
    shares: Shares
    eval_share: Float
    datasets: dict[str, Dataset]


class Training(Section):
    """The settings that the SFT and reward stages share."""

    datasets: Datasets
    max_tokens: Int = Field(ge=2, description="longest prompt + response; longer rows are dropped")
    train_batch_size: Int = Field(ge=1, description="rows per optimizer step, all processes")
    epochs: Float | None = Field(None, gt=0, description="passes over the data; or give `steps`")
    steps: Int | None = Field(None, ge=1, description="optimizer steps; or give `epochs`")
    eval_rows: Int = Field(ge=1, description="held-out rows to evaluate, at most")
    dtype: Dtype = Field(description="type of weights and activations; fp16 on GPUs only")
    optimizer: Optimizer
    lora: Lora | None = Field(None, description="adapters; null: train all weights")
    run: TrainingRun

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from fp16_without_gpus(self.dtype, self.run)
        yield from not_one(self, "epochs", "steps")
        per_forward = self.run.least_rows
        if self.train_batch_size % per_forward:
            yield (
                ("train_batch_size", "run.micro_batch_size", "run.processes"),
                "train_batch_size should be a multiple of micro_batch_size x processes: choose"
                f" {multiples(self.train_batch_size, per_forward)}",
            )


class Sft(Training):
    """The SFT stage: supervised fine-tuning of the actor on responses."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if without := [d.name for d in self.datasets if not d.columns.has_responses]:
            yield (
                ("datasets",),
                f"the SFT stage imitates responses, {', '.join(without)} has none: name its column as `response` or"
                " `chosen` in `columns`, or choose another dataset",
            )


class Reward(Training, Model):
    """The reward stage: a reward model trained on preference pairs."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if without := [d.name for d in self.datasets if not d.columns.has_pairs]:
            yield (
                ("datasets",),
                f"the reward stage compares responses, {', '.join(without)} has no pairs: name `chosen` and"
                " `rejected` in `columns`, or choose another dataset",
            )


class Rlhf(Section):
    """The PPO stage."""

    datasets: Datasets
    max_prompt_tokens: Int = Field(ge=1, description="longest prompt; longer ones are dropped")
    max_new_tokens: Int = Field(ge=1, description="longest response")
    iterations: Int | None = Field(None, ge=1, description="rollouts; or give `epochs`")
    epochs: Float | None = Field(None, gt=0, description="passes over prompts; or `iterations`")
    rollout_batch_size: Int = Field(ge=1, description="prompts per iteration, all processes")
    mini_batches: Int = Field(ge=1, description="optimizer steps per pass over a rollout")
    ppo_epochs: Int = Field(ge=1, description="passes over a rollout")
    temperature: Float = Field(gt=0, description="sampling temperature, also in every log-prob")
    missing_eos_penalty: Float = Field(
        ge=0, description="subtracted from the score of a response without EOS"
    )
    reward_clip: Float = Field(gt=0, description="normalised scores are clipped to +- this")
    reward_samples: Int = Field(
        ge=2, description="SFT responses from which the scores' mean and sd are measured"
    )
    kl_coef: Float = Field(ge=0, description="coefficient of the per-token KL penalty in the reward")
    kl_target: Float | None = Field(
        None, gt=0, description="nats per response that kl_coef is adapted to; null: kl_coef is fixed"
    )
    kl_horizon: Int = Field(ge=1, description="samples over which an adaptive kl_coef changes")
    gamma: Float = Field(gt=0, le=1, description="discount per token")
    gae_lambda: Float = Field(ge=0, le=1, description="lambda of generalised advantage estimation")
    clip_range: Float = Field(gt=0, description="clipping range of the policy ratio")
    value_clip_range: Float = Field(gt=0, description="clipping range of values around those of the rollout")
    shuffle_scores: bool = Field(description="control experiment: permute the scores of a rollout")
    ema_decay: Float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per optimizer step of the mean of the actor's weights, rlhf/actor_ema; null: no mean",
    )
    ptx_coef: Float | None = Field(
        None,
        gt=0,
        description="coefficient of the SFT loss (mean per token) on SFT rows, added to the policy loss",
    )
    dtype: Dtype = Field(description="type of weights and activations; fp16 on GPUs only")
    actor: Optimizer
    critic: Optimizer
    actor_lora: Lora | None = Field(None, description="adapters of the actor; null: train all weights")
    critic_lora: Lora | None = Field(None, description="adapters of the critic; null: train all weights")
    run: RlhfRun

    def conflicts(self) -> Iterator[Conflict]:
        yield from fp16_without_gpus(self.dtype, self.run)
        yield from not_one(self, "epochs", "iterations")
        batch, run = self.rollout_batch_size, self.run
        if self.kl_target is not None and self.kl_coef == 0:
            yield (
                ("kl_target", "kl_coef"),
                "an adaptive kl_coef is multiplied, and 0 stays 0: choose kl_coef above 0, or kl_target null",
            )
        if self.kl_target is not None and self.kl_horizon < batch:
            yield (
                ("kl_horizon", "rollout_batch_size"),
                f"kl_coef would jump within one iteration: choose kl_horizon {batch} or more",
            )
        if reference.is_actor_without_adapters(self.actor_lora) and "reference" in run.offload:
            yield (
                ("run.offload", "actor_lora"),
                "the actor without its adapters is the reference, so there is no copy to offload: leave it out",
            )
        per_forward = self.mini_batches * run.least_rows
        if batch % per_forward:
            yield (
                ("rollout_batch_size", "mini_batches", "run.micro_batch_size", "run.processes"),
                "rollout_batch_size should be a multiple of mini_batches x micro_batch_size x processes: choose"
                f" {multiples(batch, per_forward)}",
            )
        if rest := self.reward_samples % batch % run.processes:
            yield (
                ("reward_samples", "rollout_batch_size", "run.processes"),
                f"the last {self.reward_samples % batch} samples, after full batches of rollout_batch_size, do not"
                f" divide over {run.processes} processes ({rest} are left): choose reward_samples"
                f" {multiples(self.reward_samples, batch)}",
            )


class Eval(Section):
    """The comparison of responses before (SFT) and after (RLHF) on held-out prompts."""

    prompts: Int = Field(ge=1, description="held-out prompts, at most")
    max_new_tokens: Int = Field(ge=1, description="longest response")
    temperature: Float = Field(ge=0, description="sampling temperature; 0 is greedy")
    seed: Int = Field(ge=0, description="seed of sampling, the same for every model")
    judge: Literal["vader"] | None = Field(description="a second measure, independent of the reward model")
