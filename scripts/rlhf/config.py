"""The configuration: one frozen, validated object made from `config.yaml`.

Values live in `config.yaml` alone; this module holds their types, ranges and meaning. What changes
a result is named directly; what changes nothing but rounding or speed (micro-batches, processes,
threads, intervals) stands in each stage's `run` and takes no part in an artefact's name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf import catalog, reference
from rlhf.config_training import (
    Conflict,
    Dtype,
    Float,
    Int,
    Lora,
    Optimizer,
    RlhfRun,
    Section,
    TrainingRun,
    fp16_without_gpus,
    multiples,
    not_one,
)
from rlhf.config_training import Run as Run
from rlhf.errors import ConfigError
from rlhf.layers import Tree, chain_of, listing, merged, mistakes, unknown

STAGES = ("sft", "reward", "rlhf")

SCENARIO = re.compile(r"[a-z0-9][a-z0-9-]*")  # a scenario's name, which is part of paths

REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]*"  # a branch, tag or commit; part of paths


def _known_model(name: str) -> str:
    if why := catalog.unknown_model(name):
        raise ValueError(why)
    return name


def _known_dataset(name: str) -> str:
    if why := catalog.unknown_dataset(name):
        raise ValueError(why)
    return name


ModelName = Annotated[str, AfterValidator(_known_model)]
DatasetName = Annotated[str, AfterValidator(_known_dataset)]


def _foreign_revision(field: str, name: str, revision: str) -> Iterator[Conflict]:
    if revision != "main" and catalog.kind(name) != "hub":
        yield (
            (field, "revision"),
            f"{name} is not on the Hub and has no revision {revision}: leave revision out",
        )


class Model(Section):
    """A pretrained model."""

    model: ModelName = Field(description="where the pretrained model comes from")
    revision: str = Field("main", pattern=f"^{REVISION}$", description="branch, tag or commit on the Hub")

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from _foreign_revision("model", self.model, self.revision)


class Columns(Section):
    """Which columns of a dataset's rows hold what."""

    prompt: str = Field(description="text, or a list of messages with role and content")
    response: str | None = Field(None, description="a reply worth imitating")
    chosen: str | None = Field(None, description="the better of two replies; needs `rejected`")
    rejected: str | None = Field(None, description="the worse of two replies; needs `chosen`")
    group: str | None = Field(None, description="rows of one value stay together; null: first turn")
    dialogue: bool = Field(False, description="the prompt is text with Human: and Assistant: turns")

    def conflicts(self) -> Iterator[Conflict]:
        if (self.chosen is None) != (self.rejected is None):
            yield ("chosen", "rejected"), "chosen and rejected go together: name both or none"

    @property
    def has_pairs(self) -> bool:
        """Whether a reward model can learn from the rows."""
        return self.chosen is not None

    @property
    def has_responses(self) -> bool:
        """Whether an actor can imitate the rows' replies: the response, or the chosen one."""
        return self.response is not None or self.has_pairs


class Dataset(Section):
    """A dataset; a name alone will do for those whose columns are known."""

    name: DatasetName = Field(description="where the rows come from")
    revision: str = Field("main", pattern=f"^{REVISION}$", description="branch, tag or commit on the Hub")
    split: str = Field("train", min_length=1, description="which of its splits is read")
    columns: Columns

    @model_validator(mode="before")
    @classmethod
    def _known_by_name(cls, value: Any) -> Any:
        """Read a name as a dataset, and take the columns of a known one."""
        entry = {"name": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or "columns" in entry or "name" not in entry:
            return entry
        name = str(entry["name"])
        if why := catalog.unknown_dataset(name):
            raise ValueError(f"{name}: {why}")
        columns = catalog.known_columns(name)
        if columns is None:
            example = f"{{name: {name}, columns: {{prompt: question, response: answer}}}}"
            raise ValueError(
                f"the columns of {name} are not known: say which hold what, as {example}; of pairs: chosen and"
                " rejected instead of response"
            )
        return {**entry, "columns": columns}

    def conflicts(self) -> Iterator[Conflict]:
        yield from _foreign_revision("name", self.name, self.revision)


def _named_once(datasets: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
    names = [posixpath.normpath(d.name) if catalog.kind(d.name) == "local" else d.name for d in datasets]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands here more than once: name each dataset once")
    return datasets


Datasets = Annotated[
    tuple[Dataset, ...],
    Field(min_length=1, description="a list of names, or of {name, revision, split, columns}"),
    AfterValidator(_named_once),
]


class Shares(Section):
    """How the rows for training are shared out: each stage gets its part of the sum."""

    sft: Float = Field(gt=0, description="part of step 1")
    reward: Float = Field(gt=0, description="part of step 2")
    rlhf: Float = Field(gt=0, description="part of step 3")


class Data(Section):
    """Who gets which rows."""

    shares: Shares
    eval_share: Float = Field(gt=0, lt=1, description="part of all groups that no stage trains on")


class Training(Section):
    """What steps 1 and 2 have in common."""

    datasets: Datasets
    max_tokens: Int = Field(ge=2, description="longest prompt + response; longer rows are dropped")
    train_batch_size: Int = Field(ge=1, description="rows per optimizer step, all processes")
    epochs: Float | None = Field(None, gt=0, description="passes over the data; or give `steps`")
    steps: Int | None = Field(None, ge=1, description="optimizer steps; or give `epochs`")
    eval_rows: Int = Field(ge=1, description="held-out rows that are measured, at most")
    dtype: Dtype = Field(description="type of weights and activations; fp16 on GPUs only")
    optimizer: Optimizer
    lora: Lora | None = Field(None, description="adapters; null: train all weights")
    run: TrainingRun

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from fp16_without_gpus(self.dtype, self.run)
        yield from not_one(self, "epochs", "steps")
        part = self.run.micro_batch_size * self.run.processes
        if self.train_batch_size % part:
            yield (
                ("train_batch_size", "run.micro_batch_size", "run.processes"),
                "train_batch_size should be a multiple of micro_batch_size x processes: choose"
                f" {multiples(self.train_batch_size, part)}",
            )


class Sft(Training):
    """Step 1: supervised fine-tuning of the actor on responses."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if without := [d.name for d in self.datasets if not d.columns.has_responses]:
            yield (
                ("datasets",),
                f"step 1 imitates replies, {', '.join(without)} has none: name its column as `response` or `chosen` in"
                " `columns`, or name another dataset",
            )


class Reward(Training, Model):
    """Step 2: a reward model on preference pairs."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if without := [d.name for d in self.datasets if not d.columns.has_pairs]:
            yield (
                ("datasets",),
                f"step 2 compares replies, {', '.join(without)} has no pairs: name `chosen` and `rejected` in `columns`,"
                " or name another dataset",
            )


class Rlhf(Section):
    """Step 3: PPO."""

    datasets: Datasets
    max_prompt_tokens: Int = Field(ge=1, description="longest prompt; longer ones are dropped")
    max_new_tokens: Int = Field(ge=1, description="longest response")
    iterations: Int | None = Field(None, ge=1, description="rollouts; or give `epochs`")
    epochs: Float | None = Field(None, gt=0, description="passes over prompts; or `iterations`")
    rollout_batch_size: Int = Field(ge=1, description="prompts per iteration, all processes")
    mini_batches: Int = Field(ge=1, description="optimizer steps per pass over a rollout")
    ppo_epochs: Int = Field(ge=1, description="passes over a rollout")
    temperature: Float = Field(gt=0, description="sampling temperature, also in every log-prob")
    missing_eos_penalty: Float = Field(ge=0, description="off the score of an unfinished response")
    reward_clip: Float = Field(gt=0, description="normalised scores are clipped to +- this")
    reward_samples: Int = Field(ge=2, description="SFT replies that give the score's mean and sd")
    kl_coef: Float = Field(ge=0, description="coefficient of the per-token KL penalty in the reward")
    kl_target: Float | None = Field(None, gt=0, description="nats per response; null: fixed coef")
    kl_horizon: Int = Field(ge=1, description="samples over which an adaptive coefficient moves")
    gamma: Float = Field(gt=0, le=1, description="discount per token")
    gae_lambda: Float = Field(ge=0, le=1, description="lambda of generalised advantage estimation")
    clip_range: Float = Field(gt=0, description="clipping range of the policy ratio")
    value_clip_range: Float = Field(gt=0, description="clipping range of values around those of the rollout")
    shuffle_scores: bool = Field(description="control experiment: scores permuted in the rollout")
    ema_decay: Float | None = Field(
        None, gt=0, lt=1, description="per optimizer step, of a mean of the actor's weights: rlhf/actor_ema"
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
                "a coefficient of 0 stays 0, it moves by factors: choose kl_coef above 0, or kl_target null",
            )
        if self.kl_target is not None and self.kl_horizon < batch:
            yield (
                ("kl_horizon", "rollout_batch_size"),
                f"the coefficient would jump: choose kl_horizon {batch} or more",
            )
        if reference.is_bare_actor(self.actor_lora) and "reference" in run.offload:
            yield (
                ("run.offload", "actor_lora"),
                "the actor without adapters is the reference, and there is no copy to offload: leave it out",
            )
        part = self.mini_batches * run.micro_batch_size * run.processes
        if batch % part:
            yield (
                ("rollout_batch_size", "mini_batches", "run.micro_batch_size", "run.processes"),
                "rollout_batch_size should be a multiple of mini_batches x micro_batch_size x processes: choose"
                f" {multiples(batch, part)}",
            )
        if rest := self.reward_samples % batch % run.processes:
            yield (
                ("reward_samples", "rollout_batch_size", "run.processes"),
                f"batches of rollout_batch_size leave {self.reward_samples % batch} samples, of which {rest} are"
                f" too many for equal parts: choose reward_samples {multiples(self.reward_samples, batch)}",
            )


class Eval(Section):
    """The comparison of replies before (SFT) and after (RLHF) on held-out prompts."""

    prompts: Int = Field(ge=1, description="held-out prompts, at most")
    max_new_tokens: Int = Field(ge=1, description="longest reply")
    temperature: Float = Field(ge=0, description="sampling temperature; 0 is greedy")
    seed: Int = Field(ge=0, description="seed of sampling, the same for every model")
    judge: Literal["vader"] | None = Field(description="an independent measure beside the reward model")


class Scenario(Section):
    """One run of the pipeline, from pretrained models to the RLHF actor."""

    seed: Int = Field(ge=0, lt=2**31, description="seed of everything random")
    actor: Model
    data: Data
    sft: Sft
    reward: Reward
    rlhf: Rlhf
    eval: Eval

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._too_long()
        yield from self._two_tokenizers()
        yield from self._uneven_heads()

    def _too_long(self) -> Iterator[Conflict]:
        """Yield lengths that a built-in model has no positions for."""
        for model, *parts in (
            ("actor.model", "sft.max_tokens"),
            ("reward.model", "reward.max_tokens"),
            ("actor.model", "rlhf.max_prompt_tokens", "rlhf.max_new_tokens"),
            ("actor.model", "rlhf.max_prompt_tokens", "eval.max_new_tokens"),
        ):
            length = sum(attrgetter(part)(self) for part in parts)
            if catalog.kind(attrgetter(model)(self)) == "builtin" and length > catalog.POSITIONS:
                yield (
                    (*parts, model),
                    f"{length} tokens are more than the {catalog.POSITIONS} positions of a built-in model",
                )

    def _two_tokenizers(self) -> Iterator[Conflict]:
        """Yield two built-in models that tokenise differently; others' are seen by step 3."""
        shapes = [catalog.OPT_SHAPE.fullmatch(m) for m in (self.actor.model, self.reward.model)]
        if len({shape["vocabulary"] for shape in shapes if shape}) > 1:
            yield ("actor.model", "reward.model"), "they have different tokenizers: give both one bpe"

    def _uneven_heads(self) -> Iterator[Conflict]:
        """Yield a built-in actor whose heads cannot be shared out; others are seen when step 3 starts."""
        size, shape = self.rlhf.run.inference_tp_size, catalog.OPT_SHAPE.fullmatch(self.actor.model)
        heads = int(shape["hidden"]) // catalog.HEAD_SIZE if shape else size
        if heads % size:
            yield (
                ("rlhf.run.inference_tp_size", "actor.model"),
                f"inference_tp_size should divide the actor's {heads} heads",
            )


class Config(Section):
    """The whole of `config.yaml`, scenarios resolved."""

    pvc: str = Field(".", min_length=1, description="mount point of the volume for all artefacts")
    offline: bool = Field(False, description="nothing is asked of the Hub; what is missing is an error")
    scenarios: dict[str, Scenario]


def load(tree: Tree) -> Config:
    """Resolve and validate a configuration tree.

    Args:
        tree: what `config.yaml` (and `--config`) says: `pvc`, `defaults`, `scenarios`. A scenario's
            `base` names another scenario that it overrides; without one it overrides `defaults`.

    Raises:
        ConfigError: with all mistakes at once, each with field, value, origin and remedy.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration should be a mapping, it is {tree!r}")
    errors = _odd_top(tree)
    parts = (tree.get(key) for key in ("defaults", "scenarios"))  # `_odd_top` tells of one that is no mapping
    defaults, overrides = (part if isinstance(part, dict) else {} for part in parts)
    sound = isinstance(tree.get("defaults") or {}, dict)
    scenarios: dict[str, Tree] = {}
    for name in overrides:
        if not (isinstance(name, str) and SCENARIO.fullmatch(name)):
            errors.append(f"scenarios.{name}: a scenario's name is lower-case letters, digits and hyphens")
        above, why = chain_of(name, overrides)
        errors += [why] if why else []
        chain = [("defaults", defaults), *above]
        errors += mistakes(Scenario, str(name), chain, whole=sound and why is None)
        scenarios[name] = merged(chain)
    if errors:
        raise ConfigError(listing(errors))
    rest = {key: tree[key] for key in ("pvc", "offline") if key in tree}
    return Config.model_validate({**rest, "scenarios": scenarios})


def _odd_top(tree: Tree) -> list[str]:
    """Return what is wrong beside `defaults` and `scenarios`."""
    known, origin = ["pvc", "offline", "defaults", "scenarios"], "config.yaml, --configfile or --config"
    errors = [unknown(str(key), tree[key], origin, known) for key in tree.keys() - set(known)]
    if not isinstance(tree.get("pvc", "."), str) or not tree.get("pvc", "."):
        errors.append(f"pvc = {tree['pvc']!r} (from {origin}): should be the path of a directory")
    offline = tree.get("offline", False)
    if not isinstance(offline, bool) and offline not in ("true", "false"):  # a text where --config says it
        errors.append(f"offline = {offline!r} (from {origin}): should be true or false")
    if not isinstance(tree.get("defaults") or {}, dict):
        errors.append(f"defaults = {tree['defaults']!r} (from {origin}): should be a mapping")
    if not (isinstance(tree.get("scenarios"), dict) and tree["scenarios"]):
        example = "should be a mapping with at least one scenario, as `my-run: {base: tiny}`"
        errors.append(f"scenarios = {tree.get('scenarios')!r}: {example}")
    return errors
