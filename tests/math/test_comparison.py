"""Replies before and after, compared by one process and by two that share the models: the same rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import trainings

from rlhf import builtin_opt, models
from rlhf.templates import load_tokenizer

CONFIG = {"prompts": 21, "max_new_tokens": 6, "temperature": 1.0, "seed": 3, "judge": "vader"}
RUNS = {
    "one": {"processes": 1},
    "two": {"processes": 2, "zero_stage": 3, "inference_tp_size": 2, "offload": ["reference"]},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return name of a run -> directory of a comparison by it."""
    root = tmp_path_factory.mktemp("comparison")
    for seed, name in ((1, "sft/model"), (2, "rlhf/actor")):
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
        for name in RUNS
    )
    assert len(one) == len(two) == 21
    for a, b in zip(one, two, strict=True):
        assert a["prompt"] == b["prompt"]
        for when in ("before", "after"):
            assert a[when]["reply"] == b[when]["reply"]
            for figure in ("score", "kl", "words", "judged"):
                assert b[when][figure] == pytest.approx(a[when][figure], rel=1e-4, abs=1e-4)


def test_before_and_after_are_told_apart(compared):
    rows = [json.loads(line) for line in (compared["one"] / "replies.jsonl").read_text().splitlines()]
    assert all(abs(row["before"]["kl"]) < 1e-4 for row in rows)
    assert all(row["after"]["kl"] != 0 for row in rows)
    summary = json.loads((compared["one"] / "summary.json").read_text())
    assert summary["prompts"] == 21
    assert "21 held-out prompts" in (compared["one"] / "table.txt").read_text()
