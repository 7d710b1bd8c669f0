"""The plan: every artefact that the scenarios of a configuration need.

The Snakefile computes the plan while it is parsed, so this module does no I/O. Rules look up an
artefact by its path.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from rlhf.config import catalog
from rlhf.config.mistakes import listing
from rlhf.config.scenario import Config, Scenario
from rlhf.config.sources import Dataset, Model
from rlhf.config.stages import STAGES, Preparation, Reward, Sft, Stage
from rlhf.config.training import Run
from rlhf.errors import ConfigError
from rlhf.store import layout, naming

# Stage -> its entry script, whose code is part of an artefact's name.
ENTRY = {
    "model": "make_model.py",
    "dataset": "make_dataset.py",
    "data": "prepare_data.py",
    "sft": "train_sft.py",
    "reward": "train_reward.py",
    "rlhf": "train_ppo.py",
    "eval": "compare_responses.py",
}
FETCH = {"model": "fetch_model.py", "dataset": "fetch_dataset.py"}  # from the Hub or the volume


@dataclass(frozen=True)
class Artefact:
    """One artefact of the plan."""

    path: str  # relative to the volume
    stage: str
    spec: dict[str, Any]  # what its entry script reads: stage, configuration, seed, parents, code
    run: Run | None  # how it is executed; None for sources and data
    title: str  # for messages
    scenarios: tuple[str, ...]  # that need it; the first of them decides `run`
    script: str  # its entry script
    run_differs: tuple[str, ...] = ()  # scenarios with another `run`

    @property
    def parents(self) -> dict[str, str]:
        """Role -> path of an artefact that it is built from."""
        parents: dict[str, str] = self.spec["parents"]
        return parents


@dataclass(frozen=True)
class Plan:
    """Path -> artefact, and name under `results/` -> the path that it links to."""

    artefacts: dict[str, Artefact]
    results: dict[str, str]

    def artefact_of(self, result: str) -> Artefact:
        """Return the artefact that a name under `results/` links into."""
        stage, name = self.results[result].split("/")[1:3]
        return self.artefacts[f"store/{stage}/{name}"]


def plan(
    config: Config,
    code: Callable[[str], str],
    fingerprint: Callable[[str], str],
    first: Iterable[str] = (),
) -> Plan:
    """Return the artefacts that the scenarios of `config` need, and the results that link to them.

    Args:
        code: entry script -> digest of the code (`codehash.digest`).
        fingerprint: path of a local source -> its fingerprint (`naming.fingerprint`).
        first: scenarios to plan first: their `run` applies to artefacts that they share with others.
    """
    order = [n for n in first if n in config.scenarios]
    order += [n for n in config.scenarios if n not in order]
    artefacts: dict[str, Artefact] = {}
    results: dict[str, str] = {}
    for name in order:
        builder = _Builder(name, config.scenarios[name], code, fingerprint, artefacts)
        results |= {f"results/{name}/{result}": path for result, path in builder.results().items()}
    return Plan(artefacts, results)


def refuse_unknown(plan: Plan, targets: Iterable[str]) -> None:
    """Refuse targets that no scenario makes: Snakemake would not say which targets exist.

    Raises:
        ConfigError: with the target and the nearest ones, or those of the scenario that it names.
    """
    known = [*plan.results, *plan.artefacts]
    for target in targets:
        name = posixpath.normpath(target)
        if name in known or name.startswith("benchmarks/"):
            continue
        name = name[max(0, name.find("results/")) :]  # the volume's path is not part of a target
        _refuse_disabled(plan, target, name)
        same_scenario = [result for result in plan.results if f"/{name.removeprefix('results/')}/" in result]
        close = [name] if name in known else difflib.get_close_matches(name, known, n=3, cutoff=0.7)
        actors = [result for result in plan.results if result.endswith("/rlhf/actor")]
        raise ConfigError(
            f"no scenario makes {target}; did you mean {' or '.join(same_scenario or close or actors)}?"
        )


def _refuse_disabled(plan: Plan, target: str, name: str) -> None:
    """Refuse a result that its scenario's settings disable, with the results that the scenario has."""
    if (
        not name.startswith("results/")
        or name in plan.results
        or name.split("/", 2)[-1] not in layout.RESULTS
    ):
        return
    scenario = name[: name.index("/", len("results/")) + 1]
    if results := [result for result in plan.results if result.startswith(scenario)]:
        raise ConfigError(
            f"{target} is not made: adapters need `lora` with `only`, actor_ema needs rlhf.ema_decay."
            f" This scenario makes {', '.join(results)}"
        )


def refuse_misplaced(config: Config, scenarios: Iterable[str], exists: Callable[[str], bool]) -> None:
    """Refuse local sources that do not exist, and Hub names for which the volume has a directory.

    Args:
        scenarios: those that are requested; sources of others are not checked.
        exists: whether the volume has a path.

    Raises:
        ConfigError: with all of them, each with scenarios, field and what to do.
    """
    mistakes: dict[str, list[str]] = {}  # mistake -> scenarios
    for scenario in dict.fromkeys(s for s in scenarios if s in config.scenarios):
        for field, name in _sources(config.scenarios[scenario]):
            if mistake := _misplaced(field, name, exists(name), posixpath.abspath(config.pvc)):
                mistakes.setdefault(f"{field} = {name!r}: {mistake}", []).append(scenario)
    if mistakes:
        raise ConfigError(listing([f"{', '.join(names)}: {mistake}" for mistake, names in mistakes.items()]))


def _sources(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Yield (field, name) of a scenario's models and datasets."""
    yield "actor.model", scenario.actor.model
    yield "reward.model", scenario.reward.model
    for stage in STAGES:
        yield from ((f"{stage}.datasets", dataset.name) for dataset in getattr(scenario, stage).datasets)


def _misplaced(field: str, name: str, exists: bool, volume: str) -> str | None:
    """Return why a source is not where its name says, and what to do; None if it may be there."""
    origin = catalog.origin(name)
    if origin == "hub" and exists:
        return (
            "this is a repository on the Hub, and the volume has a directory with that name: write"
            f" ./{name} for the directory, or move it away"
        )
    if origin == "local" and not exists:
        what = "directory" if field.endswith("model") else "file or directory"
        where = "" if name.startswith("/") else f" below pvc ({volume})"
        return f"no such {what}{where}: copy it there, or correct the path"
    return None


@dataclass
class _Builder:
    """Builds the artefacts of one scenario, parents before children."""

    name: str
    scenario: Scenario
    code: Callable[[str], str]
    fingerprint: Callable[[str], str]
    artefacts: dict[str, Artefact]

    def results(self) -> dict[str, str]:
        """Add all artefacts; return result -> the path that it links to."""
        s = self.scenario
        actor, scorer = self.model(s.actor), self.model(s.reward)
        sft = self.supervised("sft", s.sft, actor, actor)
        reward = self.supervised("reward", s.reward, scorer, scorer)
        stages = {"sft": sft, "reward": reward}
        prompts = self.data("rlhf", actor, s.rlhf.datasets, s.rlhf.max_prompt_tokens)
        ptx = {"ptx": self.artefacts[sft].parents["data"]} if s.rlhf.ptx_coef is not None else {}
        title = f"PPO of {s.actor.model} with the reward model from {s.reward.model}"
        spec = self.spec("rlhf", _content(s.rlhf), {**stages, "data": prompts, **ptx})
        stages["rlhf"] = self.add(spec, s.rlhf.run, title)
        title = f"Responses of {s.actor.model} before and after RLHF"
        spec = self.spec("eval", s.eval.model_dump(mode="json"), {**stages, "data": prompts})
        eval_ = self.add(spec, s.rlhf.run, title)
        links = {result: f"{stages[result.split('/')[0]]}/{path}" for result, path in layout.RESULTS.items()}
        return {r: path for r, path in links.items() if r not in _disabled(s)} | {"rlhf/eval": eval_}

    def model(self, model: Model) -> str:
        """Add a pretrained model; a built-in one has random weights, which the seed decides."""
        builtin = {"model": model.model, "seed": self.scenario.seed}
        return self.source("model", model.model, model.revision, builtin)

    def dataset(self, dataset: Dataset) -> str:
        """Add a dataset."""
        builtin = {"dataset": dataset.name, "package": catalog.CHITCHAT_VERSION}
        return self.source("dataset", dataset.name, dataset.revision, builtin)

    def source(self, stage: str, name: str, revision: str, builtin: dict[str, Any]) -> str:
        """Add a model or dataset: a built-in one, or from the Hub, or from the volume.

        The last two are named by where they come from, not by our code: an edit of a script must not
        download a model again.

        Args:
            stage: model or dataset.
            builtin: configuration of the artefact if the source is a built-in one.
        """
        origin = catalog.origin(name)
        if origin == "builtin":
            return self.add(self.spec(stage, builtin, {}), None, f"{name}, made here", f"{stage}s/{name}")
        if origin == "hub":
            path = f"{stage}s/{name}@{quote(revision, safe='')}"
            config, title = {stage: name, "revision": revision}, f"{name} at {revision}, from the Hub"
        else:
            fingerprint = self.fingerprint(name)
            path = f"{stage}s/local/{_plain(name)}@{fingerprint}"
            config, title = {stage: name, "fingerprint": fingerprint}, f"{name}, from the volume"
        spec = self.spec(stage, config, {}, FETCH[stage])
        return self.record(Artefact(path, stage, spec, None, title, (self.name,), FETCH[stage]))

    def data(self, stage: Stage, model: str, datasets: Iterable[Dataset], max_tokens: int) -> str:
        """Add the tokenised rows of a stage."""
        parents = {layout.TOKENIZER: model}
        parents |= {layout.DATASET + d.name: self.dataset(d) for d in datasets}
        rows = {d.name: d.model_dump(exclude={"revision"}) for d in datasets}
        data = self.scenario.data.model_dump()
        config = Preparation.model_validate(
            {"stage": stage, "max_tokens": max_tokens, **data, "datasets": rows}
        )
        spec = self.spec("data", config.model_dump(mode="json"), parents)
        return self.add(spec, None, f"Tokenised rows of {', '.join(rows)} for stage {stage}")

    def supervised(self, stage: Stage, config: Sft | Reward, model: str, tokenizer: str) -> str:
        """Add the model of the SFT or reward stage, and its rows."""
        data = self.data(stage, tokenizer, config.datasets, config.max_tokens)
        what = {"sft": "Supervised fine-tuning of", "reward": "Reward model from"}[stage]
        pretrained = {"sft": self.scenario.actor, "reward": self.scenario.reward}[stage]
        spec = self.spec(stage, _content(config), {"model": model, "data": data})
        return self.add(spec, config.run, f"{what} {pretrained.model}")

    def spec(
        self, stage: str, config: dict[str, Any], parents: dict[str, str], script: str = ""
    ) -> dict[str, Any]:
        """Return everything that decides an artefact's content."""
        seed = {"seed": self.scenario.seed} if stage in STAGES else {}
        code = self.code(script or ENTRY[stage])
        return {"stage": stage, "config": config, **seed, "parents": parents, "code": code}

    def add(self, spec: dict[str, Any], run: Run | None, title: str, path: str = "") -> str:
        """Add an artefact that is named by its spec; return its path."""
        stage = spec["stage"]
        path = f"{path}@{naming.key(spec)}" if path else f"store/{stage}/{self.slug(spec)}-{naming.key(spec)}"
        return self.record(Artefact(path, stage, spec, run, title, (self.name,), ENTRY[stage]))

    def record(self, new: Artefact) -> str:
        """Record that this scenario needs an artefact, which may be in the plan already; return its path."""
        old = self.artefacts.setdefault(new.path, new)
        if self.name not in old.scenarios:
            differs = old.run_differs + ((self.name,) if old.run != new.run else ())
            scenarios = (*old.scenarios, self.name)
            self.artefacts[new.path] = replace(old, scenarios=scenarios, run_differs=differs)
        return new.path

    def slug(self, spec: dict[str, Any]) -> str:
        """Return the readable part of an artefact's name."""
        if spec["stage"] == "data":
            return str(spec["config"]["stage"])
        return _plain((self.scenario.reward if spec["stage"] == "reward" else self.scenario.actor).model)


def _disabled(scenario: Scenario) -> set[str]:
    """Return the results that a scenario's settings disable."""
    lora = {
        "sft/adapter": scenario.sft.lora,
        "reward/adapter": scenario.reward.lora,
        "rlhf/actor_adapter": scenario.rlhf.actor_lora,
        "rlhf/critic_adapter": scenario.rlhf.critic_lora,
    }
    disabled = {result for result, adapters in lora.items() if adapters is None or not adapters.only}
    return disabled | ({"rlhf/actor_ema"} if scenario.rlhf.ema_decay is None else set())


def _plain(name: str) -> str:
    """Return the last part of a name, with characters that are safe in a path."""
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]) or "source"


def _content(config: Any) -> dict[str, Any]:
    """Return the part of a stage's configuration that decides its result: everything except `run`."""
    content: dict[str, Any] = config.model_dump(mode="json", exclude={"run"})
    return content
