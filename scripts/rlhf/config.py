"""The configuration: one frozen, validated object made from `config.yaml`.

Values live in `config.yaml` alone; this module holds their types, ranges and meaning. What changes
a result is named directly; what changes nothing but rounding or speed (micro-batches, processes,
threads, intervals) stands in each stage's `run` and takes no part in an artefact's name.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from rlhf import catalog
from rlhf.errors import ConfigError

STAGES = ("sft", "reward", "rlhf")

SCENARIO = re.compile(r"[a-z0-9][a-z0-9-]*")  # a scenario's name, which is part of paths

Tree = dict[str, Any]


def _not_a_bool(value: object) -> object:
    """Refuse yes/no where a number belongs: YAML 1.1 makes booleans of many words."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _known_model(name: str) -> str:
    if why := catalog.unknown_model(name):
        raise ValueError(why)
    return name


def _known_dataset(name: str) -> str:
    if why := catalog.unknown_dataset(name):
        raise ValueError(why)
    return name


Int = Annotated[int, BeforeValidator(_not_a_bool)]
Float = Annotated[float, BeforeValidator(_not_a_bool)]
ModelName = Annotated[str, AfterValidator(_known_model)]
DatasetName = Annotated[str, AfterValidator(_known_dataset)]


class Section(BaseModel):
    """Frozen; unknown fields, NaN and infinities are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """A pretrained model."""

    model: ModelName = Field(description="organisation/name; `builtin/opt-LxH-bpeV` is made here")


class Optimizer(Section):
    """AdamW with a schedule over optimizer steps."""

    learning_rate: Float = Field(ge=0, description="peak learning rate")
    weight_decay: Float = Field(ge=0, description="decoupled, on matrices only")
    betas: tuple[Float, Float] = Field(description="Adam's moment decay rates")
    eps: Float = Field(gt=0, description="Adam's denominator term")
    max_grad_norm: Float = Field(gt=0, description="global gradient norm is clipped to this")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="shape after warm-up")
    warmup_steps: Int = Field(ge=0, description="optimizer steps of linear warm-up")
    final_ratio: Float = Field(ge=0, le=1, description="last learning rate / peak")


class Run(Section):
    """How a stage runs. Nothing here changes what it makes, but for rounding."""

    processes: Int = Field(ge=1, le=1, description="processes; more than one is not supported yet")
    micro_batch_size: Int = Field(ge=1, description="sequences or pairs per process and forward")
    threads: Int = Field(ge=1, description="intra-op threads of torch; changes the last bits")
    save_steps: Int = Field(ge=1, description="steps between saved training states")
    log_steps: Int = Field(ge=1, description="steps between updates of the progress bar's figures")
    mem_mb: Int = Field(ge=1, description="memory per node in MB")
    runtime: Int = Field(ge=1, description="limit in minutes")


class Data(Section):
    """Who gets which rows."""

    shares: dict[Literal["sft", "reward", "rlhf"], Float] = Field(description="parts per stage")
    eval_share: Float = Field(gt=0, lt=1, description="part of all groups that no stage trains on")

    @model_validator(mode="after")
    def _every_stage_has_a_share(self) -> Data:
        if set(self.shares) != set(STAGES) or min(self.shares.values()) <= 0:
            raise ValueError(f"needs a share above 0 for each of {', '.join(STAGES)}")
        return self


class Training(Section):
    """What steps 1 and 2 have in common."""

    datasets: tuple[DatasetName, ...] = Field(min_length=1, description="organisation/name of each set")
    max_tokens: Int = Field(ge=2, description="longest prompt + response; longer rows are dropped")
    train_batch_size: Int = Field(ge=1, description="rows per optimizer step, all processes")
    epochs: Float | None = Field(None, gt=0, description="passes over the data; or give `steps`")
    steps: Int | None = Field(None, ge=1, description="optimizer steps; or give `epochs`")
    eval_rows: Int = Field(ge=1, description="held-out rows that are measured, at most")
    dtype: Literal["bf16", "fp32"] = Field(description="of weights and activations")
    optimizer: Optimizer
    run: Run

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (the other one: null)")
        return self


class Sft(Training):
    """Step 1: supervised fine-tuning of the actor on responses."""


class Reward(Training, Model):
    """Step 2: a reward model on preference pairs."""

    @model_validator(mode="after")
    def _datasets_have_pairs(self) -> Reward:
        without = [d for d in self.datasets if catalog.DATASETS[d] != "preference"]
        if without:
            raise ValueError(f"datasets {', '.join(without)} hold no preference pairs")
        return self


class Rlhf(Section):
    """Step 3: PPO."""

    datasets: tuple[DatasetName, ...] = Field(min_length=1, description="organisation/name of each set")
    max_prompt_tokens: Int = Field(ge=1, description="longest prompt; longer ones are dropped")
    max_new_tokens: Int = Field(ge=1, description="longest response")
    iterations: Int | None = Field(None, ge=1, description="rollouts; or give `epochs`")
    epochs: Float | None = Field(None, gt=0, description="passes over prompts; or `iterations`")
    rollout_batch_size: Int = Field(ge=1, description="prompts per iteration, all processes")
    mini_batches: Int = Field(ge=1, description="optimizer steps per pass over a rollout")
    ppo_epochs: Int = Field(ge=1, description="passes over a rollout")
    temperature: Float = Field(gt=0, description="of sampling, and in every log-prob")
    missing_eos_penalty: Float = Field(ge=0, description="off the score of an unfinished response")
    reward_clip: Float = Field(gt=0, description="normalised scores are clipped to +- this")
    reward_samples: Int = Field(ge=2, description="SFT replies that give the score's mean and sd")
    kl_coef: Float = Field(ge=0, description="of the per-token KL penalty in the reward")
    kl_target: Float | None = Field(None, gt=0, description="nats per response; null: fixed coef")
    kl_horizon: Int = Field(ge=1, description="samples over which an adaptive coefficient moves")
    gamma: Float = Field(gt=0, le=1, description="discount per token")
    gae_lambda: Float = Field(ge=0, le=1, description="of generalised advantage estimation")
    clip_range: Float = Field(gt=0, description="of the policy ratio")
    value_clip_range: Float = Field(gt=0, description="of values around those of the rollout")
    shuffle_scores: bool = Field(description="control experiment: scores permuted in the rollout")
    dtype: Literal["bf16", "fp32"] = Field(description="of weights and activations")
    actor: Optimizer
    critic: Optimizer
    run: Run

    @model_validator(mode="after")
    def _lengths(self) -> Rlhf:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("give either epochs or iterations (the other one: null)")
        if self.kl_target is not None and self.kl_horizon < self.rollout_batch_size:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is below rollout_batch_size {self.rollout_batch_size}:"
                f" the coefficient would jump; choose {self.rollout_batch_size} or more"
            )
        if self.rollout_batch_size % self.mini_batches:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of mini_batches"
                f" {self.mini_batches}: choose {_multiples(self.rollout_batch_size, self.mini_batches)}"
            )
        return self


class Eval(Section):
    """The comparison of replies before (SFT) and after (RLHF) on held-out prompts."""

    prompts: Int = Field(ge=1, description="held-out prompts, at most")
    max_new_tokens: Int = Field(ge=1, description="longest reply")
    temperature: Float = Field(ge=0, description="of sampling; 0 is greedy")
    seed: Int = Field(ge=0, description="of sampling: the same for every model")
    judge: Literal["vader"] | None = Field(description="a known truth beside the reward model")


class Scenario(Section):
    """One run of the pipeline, from pretrained models to the RLHF actor."""

    seed: Int = Field(ge=0, lt=2**31, description="of everything random")
    actor: Model
    data: Data
    sft: Sft
    reward: Reward
    rlhf: Rlhf
    eval: Eval

    @model_validator(mode="after")
    def _batches_divide(self) -> Scenario:
        wholes = {
            "sft.train_batch_size": (self.sft.train_batch_size, self.sft.run),
            "reward.train_batch_size": (self.reward.train_batch_size, self.reward.run),
            "rlhf.rollout_batch_size / mini_batches": (
                self.rlhf.rollout_batch_size // self.rlhf.mini_batches,
                self.rlhf.run,
            ),
        }
        wrong = [
            f"{field} = {size} is not a multiple of micro_batch_size {run.micro_batch_size}"
            f" x processes {run.processes}: choose {_multiples(size, part)}"
            for field, (size, run) in wholes.items()
            if size % (part := run.micro_batch_size * run.processes)
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Config(Section):
    """The whole of `config.yaml`, scenarios resolved."""

    pvc: str = Field(".", min_length=1, description="mount point of the volume for all artefacts")
    scenarios: dict[str, Scenario]


def _multiples(value: int, step: int) -> str:
    below, above = value // step * step, math.ceil(value / step) * step
    return f"{below} or {above}" if below else str(above)


def load(tree: Tree) -> Config:
    """Resolve and validate a configuration tree.

    Args:
        tree: what `config.yaml` (and `--config`) says: `pvc`, `defaults`, `scenarios`. A scenario's
            `base` names another scenario that it overrides; without one it overrides `defaults`.

    Raises:
        ConfigError: with all mistakes at once, each with field, value, origin and remedy.
    """
    errors: list[str] = []
    for key in tree.keys() - {"pvc", "defaults", "scenarios"}:
        errors.append(_unknown(str(key), tree[key], "config.yaml", ["pvc", "defaults", "scenarios"]))
    overrides = tree.get("scenarios")
    if not isinstance(tree.get("pvc", "."), str) or not tree.get("pvc", "."):
        errors.append(f"pvc = {tree['pvc']!r} (from config.yaml): should be the path of a directory")
    if not isinstance(tree.get("defaults") or {}, dict):
        errors.append(f"defaults = {tree['defaults']!r} (from config.yaml): should be a mapping")
        raise ConfigError(_listing(errors))
    if not isinstance(overrides, dict) or not overrides:
        errors.append(f"scenarios = {overrides!r}: needs at least one named scenario")
        raise ConfigError(_listing(errors))
    scenarios: dict[str, Tree] = {}
    for name in overrides:
        if not (isinstance(name, str) and SCENARIO.fullmatch(name)):
            errors.append(f"scenarios.{name}: a scenario's name is lower-case letters, digits and hyphens")
            continue
        try:
            chain = _chain(name, tree)
        except ConfigError as error:
            errors.append(str(error))
            continue
        merged: Tree = {}
        for _, layer in chain:
            merged = _merge(merged, layer)
        errors += _mistakes(name, merged, chain)
        scenarios[name] = merged
    if not errors:
        return Config.model_validate({"pvc": tree.get("pvc", "."), "scenarios": scenarios})
    raise ConfigError(_listing(errors))


def _listing(errors: list[str]) -> str:
    count = f"{len(errors)} mistake" + ("s" if len(errors) > 1 else "")
    return f"{count} in the configuration:\n" + "\n".join(f"  - {e}" for e in errors)


def _chain(name: str, tree: Tree) -> list[tuple[str, Tree]]:
    """Return (origin, overrides) from `defaults` to the scenario itself."""
    scenarios, chain, seen = tree["scenarios"], [], []
    current: str | None = name
    while current is not None:
        seen.append(current)
        layer = scenarios.get(current)
        if layer is None and current in scenarios:
            layer = {}
        if not isinstance(layer, dict):
            known = ", ".join(map(str, scenarios))
            raise ConfigError(
                f"scenarios.{seen[-2] if len(seen) > 1 else name}: base {current!r}"
                f" is no scenario; there are: {known}"
                if current not in scenarios
                else f"scenarios.{current} = {layer!r}: should be a mapping"
            )
        chain.append((f"scenarios.{current}", {k: v for k, v in layer.items() if k != "base"}))
        current = layer.get("base")
        if not isinstance(current, str | None):
            raise ConfigError(f"scenarios.{seen[-1]}: base = {current!r}: should be a scenario's name")
        if current in seen:
            raise ConfigError(f"scenarios.{name}: base goes round: {' -> '.join([*seen, current])}")
    return [("defaults", tree.get("defaults") or {}), *reversed(chain)]


def _merge(base: Tree, override: Tree) -> Tree:
    """Return `base` with `override` laid over it; mappings merge, all else replaces."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _mistakes(name: str, merged: Tree, chain: list[tuple[str, Tree]]) -> list[str]:
    try:
        Scenario.model_validate(merged)
    except ValidationError as error:
        found = error.errors()
        deeper = {e["loc"][:-1] for e in found}  # a list is called too short where its items are wrong
        told = (e for e in found if not (e["type"] == "too_short" and e["loc"] in deeper))
        return [_sentence(name, e["loc"], e, chain) for e in told]
    return []


def _sentence(name: str, loc: tuple[Any, ...], error: Any, chain: list[tuple[str, Tree]]) -> str:
    """Say what is wrong, with which value, where it came from and what to do."""
    if error["type"] == "extra_forbidden":
        siblings = _fields_beside(loc)
        return _unknown(f"{name}: {_dotted(loc)}", error["input"], _origin(loc, chain), siblings)
    if error["type"] == "missing":
        help_ = _description(loc)
        return f"{name}: {_dotted(loc)} is missing: set it in defaults or in the scenario{help_}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(error["input"], dict):  # a check of a whole section: its message names the values
        return f"{name}: {_dotted(loc) or 'scenario'} (from {_origin(loc, chain)}): {message}"
    where = _origin(loc, chain)
    return f"{name}: {_dotted(loc)} = {error['input']!r} (from {where}): {message}{_description(loc)}"


def _unknown(field: str, value: object, origin: str, known: list[str]) -> str:
    close = difflib.get_close_matches(field.rsplit(".", 1)[-1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{field} = {value!r} (from {origin}): no such field; {hint}"


def _dotted(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _origin(loc: tuple[Any, ...], chain: list[tuple[str, Tree]]) -> str:
    """Name the last layer that says something at `loc`, be it null."""
    for origin, layer in reversed(chain):
        node: Any = layer
        for part in loc:
            if not (isinstance(node, dict) and part in node):
                break
            node = node[part]
        else:
            return origin
        if node is None:  # a section that was set to null above `loc`
            return origin
    return "defaults"


def _section_of(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] = Scenario
    for part in loc:
        field = section.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return None
        section = kind
    return section


def _fields_beside(loc: tuple[Any, ...]) -> list[str]:
    section = _section_of(loc[:-1])
    return list(section.model_fields) if section else []


def _description(loc: tuple[Any, ...]) -> str:
    section = _section_of(loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    return f" ({field.description})" if field and field.description else ""
