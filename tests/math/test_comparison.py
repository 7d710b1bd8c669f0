"""Responses before and after, compared by one process and by two that share the models: the same rows."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import trainings

from rlhf.config import stages
from rlhf.data.streams import Purpose, Stream
from rlhf.data.templates import load_tokenizer
from rlhf.evaluation import comparison
from rlhf.generation.sampler import generate
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models import loading
from rlhf.sources import builtin_opt
from rlhf.training.rollout import Models, observe
from rlhf.training.wrapped import SingleForward

CONFIG = {"prompts": 21, "max_new_tokens": 6, "temperature": 0.5, "seed": 3, "judge": "vader"}
RUNS = {
    "one": {"processes": 1},
    "again": {"processes": 1},
    "two": {"processes": 2, "zero_stage": 3, "inference_tp_size": 2, "offload": ["reference"]},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return name of a run -> directory of a comparison by it."""
    root = tmp_path_factory.mktemp("comparison")
    for seed, name in ((1, "sft/model"), (2, "rlhf/actor"), (1, "same/model")):
        builtin_opt.write_model({"model": "builtin/opt-1x64-bpe300", "seed": seed}, root / name)
    loading.new_scorer(root / "sft/model", torch.float32, 1, seed=3).save_pretrained(root / "reward/model")
    load_tokenizer(root / "sft/model").save_pretrained(root / "reward/model")
    trainings.write_rows(root / "data", "rlhf", vocabulary=300)
    spec = {
        "stage": "eval",
        "config": CONFIG,
        "code": "none",
        "parents": {name: str(root / name) for name in ("sft", "rlhf", "reward", "data")},
    }
    for name, changes in RUNS.items():
        run = trainings.settings("rlhf", {"run": changes | {"generation_batch_size": 4}}).run
        command = [
            sys.executable,
            str(trainings.SCRIPTS / "launch.py"),
            "--processes",
            str(run.processes),
            "--log",
            str(root / "log"),
            str(trainings.SCRIPTS / "compare_responses.py"),
            "--spec",
            json.dumps(spec),
            "--run",
            run.model_dump_json(),
            "--output",
            str(root / name),
        ]
        done = subprocess.run(command, capture_output=True, env=trainings.environment(), check=False)
        assert done.returncode == 0, (root / "log").read_text()[-4000:]
    return {name: root / name for name in RUNS}


def test_a_comparison_does_not_depend_on_processes(compared):
    """21 prompts over two processes: one gets two responses and is counted once."""
    one, two = (
        [json.loads(line) for line in (compared[name] / "responses.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 21
    for a, b in zip(one, two, strict=True):
        assert a["prompt"] == b["prompt"]
        for when in ("before", "after"):
            assert a[when]["response"] == b[when]["response"]
            for figure in ("score", "kl", "words", "judged"):
                assert b[when][figure] == pytest.approx(a[when][figure], rel=1e-4, abs=1e-4)


def test_a_comparison_made_twice_gives_the_same_bytes(compared):
    first, second = ((compared[name] / "responses.jsonl").read_bytes() for name in ("one", "again"))
    assert first == second


def test_the_same_seed_gives_a_built_in_model_the_same_bytes(compared):
    root = compared["one"].parent
    first, second, other = (
        {file.name: file.read_bytes() for file in (root / name).iterdir()}
        for name in ("sft/model", "same/model", "rlhf/actor")
    )
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_before_and_after_are_not_mixed_up(compared):
    rows = [json.loads(line) for line in (compared["one"] / "responses.jsonl").read_text().splitlines()]
    assert all(abs(row["before"]["kl"]) < 1e-4 for row in rows)
    assert all(row["after"]["kl"] != 0 for row in rows)
    summary = json.loads((compared["one"] / "summary.json").read_text())
    assert summary["prompts"] == 21
    assert "21 held-out prompts" in (compared["one"] / "table.txt").read_text()


def loaded(root, wrap=SingleForward):
    """Return the models of the comparison in `root`."""
    return comparison.Models(
        actor=wrap(loading.load_actor(root / "rlhf/actor", torch.float32)),
        reference=wrap(loading.load_actor(root / "sft/model", torch.float32)),
        reward=wrap(loading.load_scorer(root / "reward/model", torch.float32)),
        tokenizer=load_tokenizer(root / "sft/model"),
    )


def responses_to(prompts, models):
    """Return responses of the actor at the temperature of the configuration."""
    sampling = Sampling(6, 0.5, models.tokenizer.eos_token_id, models.tokenizer.pad_token_id)
    noise = uniforms(Stream(1, Purpose.EVALUATION), range(len(prompts)), 6)
    return generate(models.actor.model, prompts, sampling, noise)


def described(generated, models, micro_batch_size):
    run = trainings.settings("rlhf", {}).run.model_copy(update={"micro_batch_size": micro_batch_size})
    return comparison._described(generated, models.actor, models, stages.Eval(**CONFIG), run)


def test_the_kl_is_that_of_the_sampled_responses(compared):
    """At the temperature of the configuration, summed over each response."""
    models = loaded(compared["one"].parent)
    generated = responses_to([np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)], models)
    four = Models(models.actor, models.reward, models.reference, models.reward)
    rollout = observe(four, generated, 0.5, 2)
    kl = ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.response_mask).sum(-1)
    rows = described(generated, models, 2)
    assert [row["kl"] for row in rows] == pytest.approx(kl.tolist(), rel=1e-4)
    assert all(abs(row["kl"]) > 0.01 for row in rows)


def test_models_read_no_more_responses_at_a_time_than_in_ppo(compared):
    """Whoever has the memory for PPO has it for the comparison; the figures are the same."""
    widest = []

    class Watched(SingleForward):
        def __call__(self, function, batch, *rest):
            widest.append(len(batch.ids))
            return super().__call__(function, batch, *rest)

    models = loaded(compared["one"].parent, Watched)
    generated = responses_to([np.arange(5, 7 + n, dtype=np.int32) for n in range(5)], models)
    whole, in_parts = (described(generated, models, size) for size in (5, 2))
    assert widest == [5] * 3 + [2] * 6 + [1] * 3
    for a, b in zip(whole, in_parts, strict=True):
        assert a["response"] == b["response"]
        for figure in ("score", "kl", "words", "judged"):
            assert a[figure] == pytest.approx(b[figure], rel=1e-4, abs=1e-5)
