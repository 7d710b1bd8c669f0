"""The plan: every artefact that a configuration asks for, by name. Pure, and quick.

The Snakefile computes it while it is parsed; rules find what they need by an artefact's name.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from rlhf import catalog, store
from rlhf.config import Config, Dataset, Model, Run, Scenario
from rlhf.errors import ConfigError
from rlhf.layers import listing

# The entry script of each kind of artefact: its code is part of the artefact's name.
ENTRY = {
    "model": "make_model.py",
    "dataset": "make_dataset.py",
    "data": "prepare_data.py",
    "sft": "train_sft.py",
    "reward": "train_reward.py",
    "rlhf": "train_ppo.py",
    "eval": "compare_replies.py",
}
# Name below `results/{scenario}/` -> place within its stage's artefact; `rlhf/eval` is an artefact itself.
RESULTS = {
    "sft/actor": "model",
    "sft/adapter": "adapter",
    "sft/curves.png": "curves.png",
    "reward/model": "model",
    "reward/adapter": "adapter",
    "reward/curves.png": "curves.png",
    "rlhf/actor": "actor",
    "rlhf/actor_adapter": "actor_adapter",
    "rlhf/actor_ema": "actor_ema",
    "rlhf/critic": "critic",
    "rlhf/critic_adapter": "critic_adapter",
    "rlhf/curves.png": "curves.png",
}
FETCH = {"model": "fetch_model.py", "dataset": "fetch_dataset.py"}  # from the Hub or the volume


@dataclass(frozen=True)
class Artefact:
    """One artefact of the plan.

    `spec` is what its entry script reads: stage, configuration, parents, code. `run` is how it is
    run. `title` says what it is, `scenarios` who wants it; the first of them decides `run`.
    `script` makes it.
    """

    path: str
    stage: str
    spec: dict[str, Any]
    run: Run | None
    title: str
    scenarios: tuple[str, ...]
    script: str
    run_differs: tuple[str, ...] = ()

    @property
    def parents(self) -> dict[str, str]:
        """Role -> path of what it is made from."""
        parents: dict[str, str] = self.spec["parents"]
        return parents


@dataclass(frozen=True)
class Plan:
    """Artefacts by path, and the names under `results/` with the place each is a link to."""

    artefacts: dict[str, Artefact]
    results: dict[str, str]

    def artefact_of(self, result: str) -> Artefact:
        """Return the artefact that a name under `results/` leads into."""
        stage, name = self.results[result].split("/")[1:3]
        return self.artefacts[f"store/{stage}/{name}"]


def plan(
    config: Config,
    code: Callable[[str], str],
    fingerprint: Callable[[str], str],
    first: Iterable[str] = (),
) -> Plan:
    """Return everything that the scenarios of `config` ask for.

    Args:
        code: entry script -> digest of the code (`codehash.digest`).
        fingerprint: path of a local source -> what stands for its content (`store.fingerprint`).
        first: scenarios whose `run` decides where several share an artefact.
    """
    order = [n for n in first if n in config.scenarios]
    order += [n for n in config.scenarios if n not in order]
    artefacts: dict[str, Artefact] = {}
    results: dict[str, str] = {}
    for name in order:
        builder = _Builder(name, config.scenarios[name], code, fingerprint, artefacts)
        results |= {f"results/{name}/{what}": place for what, place in builder.results().items()}
    return Plan(artefacts, results)


def refuse_unknown(made: Plan, targets: Iterable[str]) -> None:
    """Refuse targets that nothing makes: Snakemake would not say which there are.

    Raises:
        ConfigError: with the target and the nearest ones, or those of the scenario that it names.
    """
    known = [*made.results, *made.artefacts]
    for target in targets:
        name = posixpath.normpath(target)
        if name in known or name.startswith("benchmarks/"):
            continue
        name = name[max(0, name.find("results/")) :]  # the path of the volume is no part of a target
        if name.startswith("results/") and name not in known and name.split("/", 2)[-1] in RESULTS:
            scenario = name[: name.index("/", len("results/")) + 1]
            if theirs := [result for result in made.results if result.startswith(scenario)]:
                raise ConfigError(
                    f"{target} is not made: adapters need `lora` with `only`, actor_ema needs rlhf.ema_decay."
                    f" This scenario makes {', '.join(theirs)}"
                )
        theirs = [result for result in made.results if f"/{name.removeprefix('results/')}/" in result]
        close = [name] if name in known else difflib.get_close_matches(name, known, n=3, cutoff=0.7)
        actors = [result for result in made.results if result.endswith("/rlhf/actor")]
        raise ConfigError(
            f"no scenario makes {target}; did you mean {' or '.join(theirs or close or actors)}?"
        )


def refuse_misplaced(config: Config, scenarios: Iterable[str], exists: Callable[[str], bool]) -> None:
    """Refuse sources of the volume that are not there, and names of the Hub that lie on the volume.

    Args:
        scenarios: those that are asked for; what only others want is not looked at.
        exists: whether there is such a path on the volume.

    Raises:
        ConfigError: with all of them, each with scenarios, field and what to do.
    """
    who: dict[str, list[str]] = {}  # mistake -> scenarios
    for scenario in dict.fromkeys(s for s in scenarios if s in config.scenarios):
        for field, name in _sources(config.scenarios[scenario]):
            if why := _misplaced(field, name, exists(name), posixpath.abspath(config.pvc)):
                who.setdefault(f"{field} = {name!r}: {why}", []).append(scenario)
    if who:
        raise ConfigError(listing([f"{', '.join(theirs)}: {mistake}" for mistake, theirs in who.items()]))


def _sources(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Yield the fields of a scenario that name models and datasets, and the names."""
    yield "actor.model", scenario.actor.model
    yield "reward.model", scenario.reward.model
    for stage in ("sft", "reward", "rlhf"):
        yield from ((f"{stage}.datasets", dataset.name) for dataset in getattr(scenario, stage).datasets)


def _misplaced(field: str, name: str, there: bool, volume: str) -> str | None:
    """Return why a source is not where its name says, and what to do; None if it may be there."""
    kind = catalog.kind(name)
    if kind == "hub" and there:
        return (
            "this is a repository on the Hub, and there is a directory of that name on the volume: write"
            f" ./{name} for the directory, or move that away"
        )
    if kind == "local" and not there:
        what = "directory" if field.endswith("model") else "file or directory"
        where = "" if name.startswith("/") else f" below pvc ({volume})"
        return f"no such {what}{where}: bring it there, or correct the path"
    return None


@dataclass
class _Builder:
    """Names the artefacts of one scenario, children after parents."""

    name: str
    scenario: Scenario
    code: Callable[[str], str]
    fingerprint: Callable[[str], str]
    artefacts: dict[str, Artefact]

    def results(self) -> dict[str, str]:
        s = self.scenario
        actor, critic = self.model(s.actor), self.model(s.reward)
        sft = self.trained("sft", s.sft, {"model": actor}, s.actor.model)
        reward = self.trained("reward", s.reward, {"model": critic}, s.reward.model)
        both = {"sft": sft, "reward": reward}
        prompts = self.data("rlhf", actor, s.rlhf.datasets, {"max_tokens": s.rlhf.max_prompt_tokens})
        imitated = {"ptx": self.artefacts[sft].parents["data"]} if s.rlhf.ptx_coef is not None else {}
        rlhf = self.add(
            "rlhf",
            _what(s.rlhf),
            {**both, "data": prompts, **imitated},
            s.rlhf.run,
            f"PPO of {s.actor.model} with the reward model from {s.reward.model}",
        )
        eval_ = self.add(
            "eval",
            s.eval.model_dump(mode="json"),
            {**both, "rlhf": rlhf, "data": prompts},
            s.rlhf.run,
            f"replies of {s.actor.model} before and after RLHF",
        )
        made = {"sft": sft, "reward": reward, "rlhf": rlhf}
        links = {what: f"{made[what.split('/')[0]]}/{place}" for what, place in RESULTS.items()}
        off = _switched_off(s)
        return {what: place for what, place in links.items() if what not in off} | {"rlhf/eval": eval_}

    def model(self, model: Model) -> str:
        """A pretrained model; a built-in one has random weights, which the seed decides."""
        builtin = {"model": model.model, "seed": self.scenario.seed}
        return self.source("model", model.model, model.revision, builtin)

    def dataset(self, dataset: Dataset) -> str:
        builtin = {"dataset": dataset.name, "package": catalog.CHITCHAT_VERSION}
        return self.source("dataset", dataset.name, dataset.revision, builtin)

    def source(self, stage: str, name: str, revision: str, builtin: dict[str, Any]) -> str:
        """What is made here, fetched from the Hub, or taken from the volume.

        What is fetched is named by where it comes from, not by our code: nobody downloads a model
        again because a line was edited.
        """
        kind = catalog.kind(name)
        if kind == "builtin":
            return self.add(stage, builtin, {}, None, f"{name}, made here", place=f"{stage}s/{name}")
        if kind == "hub":
            place = f"{stage}s/{name}@{quote(revision, safe='')}"
            config, title = {stage: name, "revision": revision}, f"{name} at {revision}, from the Hub"
        else:
            mark = self.fingerprint(name)
            place = f"{stage}s/local/{_plain(name)}@{mark}"
            config, title = {stage: name, "fingerprint": mark}, f"{name}, from the volume"
        return self.record(Artefact(
            place, stage, self.spec(stage, config, {}, FETCH[stage]), None, title, (self.name,), FETCH[stage]
        ))  # fmt: skip

    def data(self, phase: str, model: str, datasets: Iterable[Dataset], limits: dict[str, int]) -> str:
        parents = {"tokenizer": model}
        parents |= {f"dataset:{d.name}": self.dataset(d) for d in datasets}
        rows = {d.name: d.model_dump(include={"split", "columns"}) for d in datasets}
        config = {"phase": phase, **limits, **self.scenario.data.model_dump(mode="json"), "datasets": rows}
        return self.add("data", config, parents, None, f"tokenised {phase} rows of {', '.join(rows)}")

    def trained(self, stage: str, config: Any, parents: dict[str, str], model: str) -> str:
        data = self.data(stage, parents["model"], config.datasets, {"max_tokens": config.max_tokens})
        what = {"sft": "supervised fine-tuning of", "reward": "reward model from"}[stage]
        return self.add(stage, _what(config), {**parents, "data": data}, config.run, f"{what} {model}")

    def add(
        self,
        stage: str,
        config: dict[str, Any],
        parents: dict[str, str],
        run: Run | None,
        title: str,
        place: str | None = None,
    ) -> str:
        """Record an artefact that is named by what goes into it; return its path."""
        if stage in ("sft", "reward", "rlhf"):
            config = {"seed": self.scenario.seed, **config}
        spec = self.spec(stage, config, parents, ENTRY[stage])
        key = store.key(stage, config, parents, spec["code"])
        path = f"{place}@{key}" if place else f"store/{stage}/{self.slug(stage, config)}-{key}"
        return self.record(Artefact(path, stage, spec, run, title, (self.name,), ENTRY[stage]))

    def spec(self, stage: str, config: dict[str, Any], parents: dict[str, str], entry: str) -> dict[str, Any]:
        return {"stage": stage, "config": config, "parents": parents, "code": self.code(entry)}

    def record(self, new: Artefact) -> str:
        """Record an artefact, or that this scenario wants it too; return its path."""
        old = self.artefacts.setdefault(new.path, new)
        if self.name not in old.scenarios:
            differs = old.run_differs + ((self.name,) if old.run != new.run else ())
            scenarios = (*old.scenarios, self.name)
            self.artefacts[new.path] = replace(old, scenarios=scenarios, run_differs=differs)
        return new.path

    def slug(self, stage: str, config: dict[str, Any]) -> str:
        if stage == "data":
            return str(config["phase"])
        return _plain(self.scenario.reward.model if stage == "reward" else self.scenario.actor.model)


def _switched_off(scenario: Scenario) -> set[str]:
    """Return the results that a scenario's settings do not make."""
    lora = {
        "sft/adapter": scenario.sft.lora,
        "reward/adapter": scenario.reward.lora,
        "rlhf/actor_adapter": scenario.rlhf.actor_lora,
        "rlhf/critic_adapter": scenario.rlhf.critic_lora,
    }
    off = {what for what, adapters in lora.items() if adapters is None or not adapters.only}
    return off | ({"rlhf/actor_ema"} if scenario.rlhf.ema_decay is None else set())


def _plain(name: str) -> str:
    """Return the last part of a name, fit for a path."""
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]) or "source"


def _what(config: Any) -> dict[str, Any]:
    """Return what changes a stage's result: all of its configuration but how it is run."""
    what: dict[str, Any] = config.model_dump(mode="json", exclude={"run"})
    return what
