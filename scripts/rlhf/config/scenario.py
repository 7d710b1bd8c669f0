"""The configuration: one frozen, validated object, read from `config.yaml`.

Values are in `config.yaml` only; this wing holds their types, ranges and meaning. Each stage's `run`
holds what changes rounding and speed only (micro-batches, processes, threads, intervals). It is not
part of an artefact's name; everything else is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter

from pydantic import Field

from rlhf.config import catalog
from rlhf.config.mistakes import listing, mistakes, unknown_field
from rlhf.config.overrides import Tree, chain_of, merged
from rlhf.config.section import Conflict, Int, Section
from rlhf.config.sources import Model
from rlhf.config.stages import Data, Eval, Reward, Rlhf, Sft
from rlhf.errors import ConfigError

SCENARIO = re.compile(r"[a-z0-9][a-z0-9-]*")  # a scenario's name, which is part of paths


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
        """Yield sequences that are longer than a built-in model's positions."""
        for model, *lengths in (
            ("actor.model", "sft.max_tokens"),
            ("reward.model", "reward.max_tokens"),
            ("actor.model", "rlhf.max_prompt_tokens", "rlhf.max_new_tokens"),
            ("actor.model", "rlhf.max_prompt_tokens", "eval.max_new_tokens"),
        ):
            total = sum(attrgetter(field)(self) for field in lengths)
            if catalog.origin(attrgetter(model)(self)) == "builtin" and total > catalog.POSITIONS:
                yield (
                    (*lengths, model),
                    f"{total} tokens are more than the {catalog.POSITIONS} positions of a built-in model:"
                    " choose fewer tokens",
                )

    def _two_tokenizers(self) -> Iterator[Conflict]:
        """Yield built-in models with different tokenizers; the PPO stage checks other models when it starts."""
        shapes = [catalog.OPT_SHAPE.fullmatch(m) for m in (self.actor.model, self.reward.model)]
        if len({shape["vocabulary"] for shape in shapes if shape}) > 1:
            yield ("actor.model", "reward.model"), "they have different tokenizers: give both the same bpe"

    def _uneven_heads(self) -> Iterator[Conflict]:
        """Yield a built-in actor whose heads do not divide; the PPO stage checks other actors when it starts."""
        size, shape = self.rlhf.run.inference_tp_size, catalog.OPT_SHAPE.fullmatch(self.actor.model)
        heads = int(shape["hidden"]) // catalog.HEAD_SIZE if shape else size
        if heads % size:
            yield (
                ("rlhf.run.inference_tp_size", "actor.model"),
                f"inference_tp_size should divide the actor's {heads} heads",
            )


class Config(Section):
    """All of `config.yaml`, with scenarios resolved."""

    pvc: str = Field(".", min_length=1, description="mount point of the volume for all artefacts")
    offline: bool = Field(False, description="make no request to the Hub; a missing source is an error")
    scenarios: dict[str, Scenario]


def load_config(tree: Tree) -> Config:
    """Resolve and validate a configuration tree.

    Args:
        tree: `config.yaml` with `--configfile` and `--config`: `pvc`, `offline`, `defaults` and
            `scenarios`. A scenario overrides its `base`, another scenario, or else `defaults`.

    Raises:
        ConfigError: with all mistakes at once, each with field, value, origin and remedy.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration should be a mapping, it is {tree!r}")
    errors = _top_level_mistakes(tree)
    # `_top_level_mistakes` has reported those that are no mappings.
    sections = (tree.get(key) for key in ("defaults", "scenarios"))
    defaults, overrides = (section if isinstance(section, dict) else {} for section in sections)
    valid_defaults = isinstance(tree.get("defaults") or {}, dict)
    scenarios: dict[str, Tree] = {}
    for name in overrides:
        if not (isinstance(name, str) and SCENARIO.fullmatch(name)):
            errors.append(f"scenarios.{name}: a scenario's name is lower-case letters, digits and hyphens")
        layers, invalid_base = chain_of(name, overrides)
        errors += [invalid_base] if invalid_base else []
        chain = [("defaults", defaults), *layers]
        errors += mistakes(Scenario, str(name), chain, complete=valid_defaults and invalid_base is None)
        scenarios[name] = merged(chain)
    if errors:
        raise ConfigError(listing(errors))
    top = {key: tree[key] for key in ("pvc", "offline") if key in tree}
    return Config.model_validate({**top, "scenarios": scenarios})


def _top_level_mistakes(tree: Tree) -> list[str]:
    """Return what is wrong with the top level of the file."""
    known, origin = ["pvc", "offline", "defaults", "scenarios"], "config.yaml, --configfile or --config"
    errors = [unknown_field(str(key), tree[key], origin, known) for key in tree.keys() - set(known)]
    if not isinstance(tree.get("pvc", "."), str) or not tree.get("pvc", "."):
        errors.append(f"pvc = {tree['pvc']!r} (from {origin}): should be the path of a directory")
    offline = tree.get("offline", False)
    if not isinstance(offline, bool) and offline not in ("true", "false"):  # --config gives a string
        errors.append(f"offline = {offline!r} (from {origin}): should be true or false")
    if not isinstance(tree.get("defaults") or {}, dict):
        errors.append(f"defaults = {tree['defaults']!r} (from {origin}): should be a mapping")
    if not (isinstance(tree.get("scenarios"), dict) and tree["scenarios"]):
        example = "should be a mapping with at least one scenario, as `my-run: {base: tiny}`"
        errors.append(f"scenarios = {tree.get('scenarios')!r}: {example}")
    return errors
