"""Settings that say how and where a stage is executed change no result, and optional features work together."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.training.metric_names import PPO_METRICS

ACTOR = "results/smoke/rlhf/actor"


def column(path, name):
    return [json.loads(line)[name] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_give_the_gradients_and_losses_of_whole_batches(smoke, tmp_path):
    """`run` is not part of a name: the same artefact, built with four micro-batches a step.

    The first steps agree within rounding, which Adam then enlarges from step to step.
    """
    run = "scenarios: {smoke: {reward: {run: {micro_batch_size: 16}}}}"
    artefact, whole = smoke.artefact("smoke/reward/model"), tmp_path / "whole"
    shutil.move(artefact, whole)
    try:
        smoke.snakemake("results/smoke/reward/model", config=run)
        for name in ("loss", "grad_norm"):
            assert column(artefact, name)[:5] == pytest.approx(column(whole, name)[:5], rel=1e-4)
        assert column(artefact, "loss") == pytest.approx(column(whole, "loss"), rel=0.05)
        assert json.loads((artefact / "run.json").read_text())["run"]["micro_batch_size"] == 16
    finally:
        shutil.rmtree(artefact, ignore_errors=True)
        shutil.move(whole, artefact)


def test_bf16_trains_and_is_saved_as_bf16(smoke):
    config = "scenarios: {half: {base: smoke, sft: {dtype: bf16, steps: 60}}}"
    smoke.snakemake("results/half/sft/actor", config=config)
    path = smoke.artefact("half/sft/actor")
    assert {str(t.dtype) for t in load_file(path / "model/model.safetensors").values()} == {"torch.bfloat16"}
    losses = column(path, "loss")
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert min(column(path, "grad_norm")) > 0


ADAPTERS, TWO = (
    "{dim: 4, alpha: 8, learning_rate: 5.0e-3}",
    "processes: 2, zero_stage: 3, micro_batch_size: 8",
)
SUPERVISED = f"steps: 4, train_batch_size: 32, eval_rows: 64, lora: {ADAPTERS}, run: {{{TWO}, packing: true}}"
EVERYTHING = f"""
scenarios:
  everything:
    base: smoke
    sft: {{{SUPERVISED}}}
    reward: {{{SUPERVISED}}}
    rlhf:
      iterations: 2
      rollout_batch_size: 32
      reward_samples: 32
      temperature: 0.7
      ema_decay: 0.5
      ptx_coef: 0.5
      actor_lora: {ADAPTERS}
      critic_lora: {ADAPTERS}
      run: {{{TWO}, threads: 1, generation_batch_size: 16, inference_tp_size: 2}}
"""
ADAPTED = {  # a result -> its adapter, and what loads it
    "sft/actor": ("sft/adapter", AutoModelForCausalLM),
    "reward/model": ("reward/adapter", AutoModelForSequenceClassification),
    "rlhf/actor": ("rlhf/actor_adapter", AutoModelForCausalLM),
    "rlhf/critic": ("rlhf/critic_adapter", AutoModelForSequenceClassification),
}


def test_lora_ema_ptx_packing_zero_3_and_shared_copies_work_together_on_two_processes(smoke):
    results = smoke.volume / "results/everything"
    names = [*ADAPTED, *(adapter for adapter, _ in ADAPTED.values()), "rlhf/actor_ema"]
    smoke.snakemake(*(f"results/everything/{name}" for name in names), config=EVERYTHING)
    weights = {}
    for name, (adapter, auto) in ADAPTED.items():
        weights[name] = auto.from_pretrained(results / name).state_dict()
        adapter_config = json.loads((results / adapter / "adapter_config.json").read_text())
        one = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
        base = auto.from_pretrained(smoke.volume / adapter_config["base_model_name_or_path"], **one)
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        merged = peft.PeftModel.from_pretrained(base, results / adapter).merge_and_unload().state_dict()
        assert distance(merged, weights[name]) < 1e-5
        assert distance(before, weights[name]) > 1e-3
    mean = AutoModelForCausalLM.from_pretrained(results / "rlhf/actor_ema").state_dict()
    last, first = weights["rlhf/actor"], weights["sft/actor"]
    assert 0.1 < distance(mean, last) / distance(first, last) < 0.9
    for result in ("sft/actor", "reward/model", "rlhf/actor"):
        artefact = smoke.artefact(f"everything/{result}")
        assert json.loads((artefact / "run.json").read_text())["world_size"] == 2
        log = (smoke.volume / f"logs/{artefact.parent.name}/{artefact.name}.log").read_text()
        assert ("packed rows: attention by" in log) == (result != "rlhf/actor")
    assert AutoModelForCausalLM.from_pretrained(results / "rlhf/actor").generation_config.temperature == 0.7
    # Before the first update the actor is the SFT model, and all log-probs are at one temperature.
    assert column(artefact, "first_approx_kl")[0] == pytest.approx(0, abs=1e-6)
    assert column(artefact, "kl_ref")[0] == pytest.approx(0, abs=1e-4)
    assert min(column(artefact, "ptx_loss")) > 0
    lines = (artefact / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).keys() - {"step"} == PPO_METRICS.keys() for line in lines)


def distance(one, other):
    """Return the norm of the difference of two models' weights."""
    assert one.keys() == other.keys()
    return float(torch.stack([(one[key] - other[key]).norm() for key in one]).norm())


def test_results_may_be_a_link_to_another_place(smoke, tmp_path):
    """LCR-BCCRC/lcr-modules#51: names led nowhere after the whole training."""
    results, kept = smoke.volume / "results", tmp_path / "deep/down/results"
    artefact = smoke.artefact("smoke/rlhf/actor")
    shutil.move(results, tmp_path / "kept")
    kept.mkdir(parents=True)
    results.symlink_to(kept)
    try:
        smoke.snakemake(ACTOR)
        assert smoke.artefact("smoke/rlhf/actor") == artefact
        assert smoke.jobs(ACTOR) == {}
    finally:
        results.unlink()
        shutil.move(tmp_path / "kept", results)
