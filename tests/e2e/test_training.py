"""What may change how a stage is run, and what it must not change."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


def column(path, name):
    return [json.loads(line)[name] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_give_the_gradients_and_losses_of_whole_batches(smoke, empty):
    """`run` is no part of a name: the same artefact, made with four micro-batches a step.

    The first steps agree but for rounding, which Adam then enlarges from step to step.
    """
    run = "scenarios: {smoke: {reward: {run: {micro_batch_size: 16}}}}"
    empty.snakemake("results/smoke/reward/model", config=run)
    whole, parts = smoke.artefact("smoke/reward/model"), empty.artefact("smoke/reward/model")
    assert whole.name == parts.name
    for name in ("loss", "grad_norm"):
        assert column(parts, name)[:5] == pytest.approx(column(whole, name)[:5], rel=1e-4)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=0.05)


def test_bf16_trains_and_is_saved_as_bf16(smoke):
    config = "scenarios: {half: {base: smoke, sft: {dtype: bf16, steps: 60}}}"
    smoke.snakemake("results/half/sft/actor", config=config)
    path = smoke.artefact("half/sft/actor")
    assert {str(t.dtype) for t in load_file(path / "model/model.safetensors").values()} == {"torch.bfloat16"}
    values = column(path, "loss")
    assert sum(values[-5:]) / 5 < values[0] - 0.5
    assert min(column(path, "grad_norm")) > 0
