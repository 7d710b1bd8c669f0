"""Replies before and after, compared by one process and by two that share the models: the same rows."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import trainings

from rlhf import builtin_opt, comparison, config, models, rollout
from rlhf.engine import Root
from rlhf.generation import Sampling
from rlhf.streams import Purpose
from rlhf.templates import load_tokenizer

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
    models.new_scorer(root / "sft/model", torch.float32, 1, seed=3).save_pretrained(root / "reward/model")
    load_tokenizer(root / "sft/model").save_pretrained(root / "reward/model")
    trainings.write_rows(root / "data", "rlhf", vocabulary=300)
    spec = {
        "stage": "eval", "config": CONFIG, "code": "none",
        "parents": {name: str(root / name) for name in ("sft", "rlhf", "reward", "data")},
    }  # fmt: skip
    for name, changes in RUNS.items():
        run = trainings.settings("rlhf", {"run": changes | {"generation_batch_size": 4}}).run
        command = [
            sys.executable, str(trainings.SCRIPTS / "launch.py"), "--processes", str(run.processes),
            "--log", str(root / "log"), str(trainings.SCRIPTS / "compare_replies.py"), "--spec", json.dumps(spec),
            "--run", run.model_dump_json(), "--output", str(root / name),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, env=trainings.environment(), check=False)
        assert done.returncode == 0, (root / "log").read_text()[-4000:]
    return {name: root / name for name in RUNS}


def test_a_comparison_does_not_depend_on_processes(compared):
    """21 prompts over two processes: one is answered twice and counted once."""
    one, two = (
        [json.loads(line) for line in (compared[name] / "replies.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 21
    for a, b in zip(one, two, strict=True):
        assert a["prompt"] == b["prompt"]
        for when in ("before", "after"):
            assert a[when]["reply"] == b[when]["reply"]
            for figure in ("score", "kl", "words", "judged"):
                assert b[when][figure] == pytest.approx(a[when][figure], rel=1e-4, abs=1e-4)


def test_a_comparison_made_twice_gives_the_same_bytes(compared):
    first, second = ((compared[name] / "replies.jsonl").read_bytes() for name in ("one", "again"))
    assert first == second


def test_the_same_seed_gives_a_built_in_model_the_same_bytes(compared):
    root = compared["one"].parent
    first, second, other = (
        {file.name: file.read_bytes() for file in (root / name).iterdir()}
        for name in ("sft/model", "same/model", "rlhf/actor")
    )
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_before_and_after_are_told_apart(compared):
    rows = [json.loads(line) for line in (compared["one"] / "replies.jsonl").read_text().splitlines()]
    assert all(abs(row["before"]["kl"]) < 1e-4 for row in rows)
    assert all(row["after"]["kl"] != 0 for row in rows)
    summary = json.loads((compared["one"] / "summary.json").read_text())
    assert summary["prompts"] == 21
    assert "21 held-out prompts" in (compared["one"] / "table.txt").read_text()


def test_the_divergence_is_that_of_what_was_sampled(compared):
    """At the temperature of the configuration, summed over each reply."""
    root = compared["one"].parent
    before, after = (
        Root(models.load_actor(root / name, torch.float32)) for name in ("sft/model", "rlhf/actor")
    )
    judge, tokenizer = (
        Root(models.load_scorer(root / "reward/model", torch.float32)),
        load_tokenizer(root / "sft/model"),
    )
    sampling = Sampling(6, 0.5, tokenizer.eos_token_id, tokenizer.pad_token_id)
    prompts = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
    made = rollout.reply(after.model, prompts, sampling, 1, Purpose.EVALUATION, range(2))
    seen = rollout.observe(rollout.Models(after, judge, before, judge), made, 0.5, 2)
    kl = ((seen.old_logprobs - seen.ref_logprobs) * seen.response_mask).sum(-1)
    rows = comparison._looked_at(made, after, before, judge, tokenizer, config.Eval(**CONFIG), 2)
    assert [row["kl"] for row in rows] == pytest.approx(kl.tolist(), rel=1e-4)
    assert all(abs(row["kl"]) > 0.01 for row in rows)


def test_models_read_no_more_replies_at_a_time_than_in_step_3(compared):
    """What step 3 fits in, its comparison fits in; the figures are the same."""
    root, widest = compared["one"].parent, []

    class Watched(Root):
        def __call__(self, function, batch, *rest):
            widest.append(len(batch.ids))
            return super().__call__(function, batch, *rest)

    before, after = (
        Watched(models.load_actor(root / name, torch.float32)) for name in ("sft/model", "rlhf/actor")
    )
    judge = Watched(models.load_scorer(root / "reward/model", torch.float32))
    tokenizer = load_tokenizer(root / "sft/model")
    sampling = Sampling(6, 0.5, tokenizer.eos_token_id, tokenizer.pad_token_id)
    prompts = [np.arange(5, 7 + n, dtype=np.int32) for n in range(5)]
    made = rollout.reply(after.model, prompts, sampling, 1, Purpose.EVALUATION, range(5))
    whole, cut = (
        comparison._looked_at(made, after, before, judge, tokenizer, config.Eval(**CONFIG), size)
        for size in (5, 2)
    )
    assert widest == [5] * 3 + [2] * 6 + [1] * 3
    for a, b in zip(whole, cut, strict=True):
        assert a["reply"] == b["reply"]
        for figure in ("score", "kl", "words", "judged"):
            assert a[figure] == pytest.approx(b[figure], rel=1e-4, abs=1e-5)
