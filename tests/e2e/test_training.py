"""What may change how a stage is run, and what it must not change."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def column(path, name):
    return [json.loads(line)[name] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_give_the_gradients_and_losses_of_whole_batches(smoke, tmp_path):
    """`run` is no part of a name: the same artefact, made with four micro-batches a step.

    The first steps agree but for rounding, which Adam then enlarges from step to step.
    """
    run = "scenarios: {smoke: {reward: {run: {micro_batch_size: 16}}}}"
    made, whole = smoke.artefact("smoke/reward/model"), tmp_path / "whole"
    shutil.move(made, whole)
    try:
        smoke.snakemake("results/smoke/reward/model", config=run)
        for name in ("loss", "grad_norm"):
            assert column(made, name)[:5] == pytest.approx(column(whole, name)[:5], rel=1e-4)
        assert column(made, "loss") == pytest.approx(column(whole, "loss"), rel=0.05)
        assert json.loads((made / "run.json").read_text())["run"]["micro_batch_size"] == 16
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.move(whole, made)


def test_bf16_trains_and_is_saved_as_bf16(smoke):
    config = "scenarios: {half: {base: smoke, sft: {dtype: bf16, steps: 60}}}"
    smoke.snakemake("results/half/sft/actor", config=config)
    path = smoke.artefact("half/sft/actor")
    assert {str(t.dtype) for t in load_file(path / "model/model.safetensors").values()} == {"torch.bfloat16"}
    values = column(path, "loss")
    assert sum(values[-5:]) / 5 < values[0] - 0.5
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


def test_lora_ema_ptx_packing_zero_3_and_shared_copies_go_together_on_two_processes(smoke):
    results = smoke.volume / "results/everything"
    names = [*ADAPTED, *(adapter for adapter, _ in ADAPTED.values()), "rlhf/actor_ema"]
    smoke.snakemake(*(f"results/everything/{name}" for name in names), config=EVERYTHING)
    weights = {}
    for name, (adapter, auto) in ADAPTED.items():
        weights[name] = auto.from_pretrained(results / name).state_dict()
        said = json.loads((results / adapter / "adapter_config.json").read_text())
        one = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
        base = auto.from_pretrained(smoke.volume / said["base_model_name_or_path"], **one)
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        merged = peft.PeftModel.from_pretrained(base, results / adapter).merge_and_unload().state_dict()
        assert apart(merged, weights[name]) < 1e-5
        assert apart(before, weights[name]) > 1e-3
    mean = AutoModelForCausalLM.from_pretrained(results / "rlhf/actor_ema").state_dict()
    last, first = weights["rlhf/actor"], weights["sft/actor"]
    assert 0.1 < apart(mean, last) / apart(first, last) < 0.9
    for step in ("sft/actor", "reward/model", "rlhf/actor"):
        made = smoke.artefact(f"everything/{step}")
        assert json.loads((made / "run.json").read_text())["world_size"] == 2
        log = (smoke.volume / f"logs/{made.parent.name}/{made.name}.log").read_text()
        assert ("packed rows: attention by" in log) == (step != "rlhf/actor")
    assert AutoModelForCausalLM.from_pretrained(results / "rlhf/actor").generation_config.temperature == 0.7
    # The first log-probs of all: sampled, seen, and learned from at the same temperature.
    assert column(made, "first_approx_kl")[0] == pytest.approx(0, abs=1e-6)
    assert column(made, "kl_ref")[0] == pytest.approx(0, abs=1e-4)
    assert min(column(made, "ptx_loss")) > 0


def apart(one, other):
    """Return the norm of the difference of two models' weights."""
    assert one.keys() == other.keys()
    return float(torch.stack([(one[key] - other[key]).norm() for key in one]).norm())
