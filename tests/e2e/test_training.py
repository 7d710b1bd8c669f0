"""What may change how a stage is run, and what it must not change."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


def losses(path):
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_give_the_losses_and_weights_of_whole_batches(smoke, empty):
    """`run` is no part of a name: the same artefact, made with four micro-batches a step."""
    run = "scenarios: {smoke: {reward: {run: {micro_batch_size: 16}}}}"
    empty.snakemake("results/smoke/reward/model", config=run)
    whole, parts = smoke.artefact("smoke/reward/model"), empty.artefact("smoke/reward/model")
    assert whole.name == parts.name
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-3)
    a, b = (load_file(path / "model/model.safetensors") for path in (whole, parts))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-3


def test_bf16_trains_and_is_saved_as_bf16(smoke):
    config = "scenarios: {half: {base: smoke, sft: {dtype: bf16, steps: 60}}}"
    smoke.snakemake("results/half/sft/actor", config=config)
    path = smoke.artefact("half/sft/actor")
    assert {str(t.dtype) for t in load_file(path / "model/model.safetensors").values()} == {"torch.bfloat16"}
    values = losses(path)
    assert sum(values[-5:]) / 5 < values[0] - 0.5
    norms = [json.loads(line)["grad_norm"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert min(norms) > 0
