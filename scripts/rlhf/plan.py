"""The plan: every artefact that a configuration asks for, by name. Pure, and quick.

The Snakefile computes it while it is parsed; rules find what they need by an artefact's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from rlhf import catalog, store
from rlhf.config import Config, Model, Run, Scenario

# The entry script of each kind of artefact: its code is part of the artefact's name.
ENTRY = {
    "model": "fetch_model.py",
    "dataset": "fetch_dataset.py",
    "data": "prepare_data.py",
    "sft": "train_sft.py",
    "reward": "train_reward.py",
    "rlhf": "train_ppo.py",
    "eval": "compare_replies.py",
}


@dataclass(frozen=True)
class Artefact:
    """One artefact of the plan.

    `spec` is what its entry script reads: stage, configuration, parents, code. `run` is how it is
    run. `title` says what it is, `scenarios` who wants it; the first of them decides `run`.
    """

    path: str
    stage: str
    spec: dict[str, Any]
    run: Run | None
    title: str
    scenarios: tuple[str, ...]
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


def plan(config: Config, code: Callable[[str], str], first: Iterable[str] = ()) -> Plan:
    """Return everything that the scenarios of `config` ask for.

    Args:
        code: entry script -> digest of the code (`codehash.digest`).
        first: scenarios whose `run` decides where several share an artefact.
    """
    order = [n for n in first if n in config.scenarios]
    order += [n for n in config.scenarios if n not in order]
    artefacts: dict[str, Artefact] = {}
    results: dict[str, str] = {}
    for name in order:
        builder = _Builder(name, config.scenarios[name], code, artefacts)
        results |= {f"results/{name}/{what}": place for what, place in builder.results().items()}
    return Plan(artefacts, results)


@dataclass
class _Builder:
    """Names the artefacts of one scenario, children after parents."""

    name: str
    scenario: Scenario
    code: Callable[[str], str]
    artefacts: dict[str, Artefact]

    def results(self) -> dict[str, str]:
        s = self.scenario
        actor, critic = self.model(s.actor), self.model(s.reward)
        sft = self.trained("sft", s.sft, {"model": actor}, s.actor.model)
        reward = self.trained("reward", s.reward, {"model": critic}, s.reward.model)
        both = {"sft": sft, "reward": reward}
        prompts = self.data("rlhf", actor, s.rlhf.datasets, {"max_tokens": s.rlhf.max_prompt_tokens})
        rlhf = self.add(
            "rlhf",
            _what(s.rlhf),
            {**both, "data": prompts},
            s.rlhf.run,
            f"PPO of {s.actor.model} against {s.reward.model}",
        )
        eval_ = self.add(
            "eval",
            s.eval.model_dump(mode="json"),
            {**both, "rlhf": rlhf, "data": prompts},
            s.rlhf.run,
            f"replies of {s.actor.model} before and after RLHF",
        )
        return {
            "sft/actor": f"{sft}/model",
            "sft/curves.png": f"{sft}/curves.png",
            "reward/model": f"{reward}/model",
            "reward/curves.png": f"{reward}/curves.png",
            "rlhf/actor": f"{rlhf}/actor",
            "rlhf/critic": f"{rlhf}/critic",
            "rlhf/curves.png": f"{rlhf}/curves.png",
            "rlhf/eval": eval_,
        }

    def model(self, model: Model) -> str:
        """A pretrained model; a built-in one has random weights, which the seed decides."""
        spec = {"model": model.model, "seed": self.scenario.seed}
        return self.add("model", spec, {}, None, f"{model.model}, random weights", model.model)

    def dataset(self, name: str) -> str:
        spec = {"dataset": name, "package": catalog.CHITCHAT_VERSION}
        return self.add("dataset", spec, {}, None, name, name)

    def data(self, phase: str, model: str, datasets: Iterable[str], limits: dict[str, int]) -> str:
        parents = {"tokenizer": model}
        parents |= {f"dataset:{name}": self.dataset(name) for name in datasets}
        config = {"phase": phase, **limits, **self.scenario.data.model_dump(mode="json")}
        sets = ", ".join(datasets)
        return self.add("data", config, parents, None, f"tokenised {phase} rows of {sets}")

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
        source: str | None = None,
    ) -> str:
        """Record an artefact, or that this scenario wants it too; return its path."""
        if stage in ("sft", "reward", "rlhf"):
            config = {"seed": self.scenario.seed, **config}
        code = self.code(ENTRY[stage])
        key = store.key(stage, config, parents, code)
        path = f"{stage}s/{source}@{key}" if source else f"store/{stage}/{self.slug(stage, config)}-{key}"
        spec = {"stage": stage, "config": config, "parents": parents, "code": code}
        new = Artefact(path, stage, spec, run, title, (self.name,))
        old = self.artefacts.setdefault(path, new)
        if self.name not in old.scenarios:
            differs = old.run_differs + ((self.name,) if old.run != run else ())
            scenarios = (*old.scenarios, self.name)
            self.artefacts[path] = replace(old, scenarios=scenarios, run_differs=differs)
        return path

    def slug(self, stage: str, config: dict[str, Any]) -> str:
        if stage == "data":
            return str(config["phase"])
        model = self.scenario.reward.model if stage == "reward" else self.scenario.actor.model
        return model.split("/")[1]


def _what(config: Any) -> dict[str, Any]:
    """Return what changes a stage's result: all of its configuration but how it is run."""
    what: dict[str, Any] = config.model_dump(mode="json", exclude={"run"})
    return what
