"""Benchmark: TRL's PPO beside ours, from the same SFT model, reward model and prompts, on one thread each.

    make peer [LEARN_DIR=where artefacts go] [LEARN_SEEDS="1 2 3"]

Both are compared as `make learn` compares: the same held-out prompts, the same sampling noise. Both loops are timed, from the first prompt to the last optimizer step. TRL has a learning rate and a KL coefficient that give
it a KL like ours; its reward model is normalised beforehand, which ours does by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from datasets import Dataset
from learn import PROJECT, SEEDS, ppo_of, report, samples, seconds_per_sample, snakemake, volume_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.data.rows import Rows
from rlhf.data.templates import load_tokenizer
from rlhf.models import loading, saving

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental.ppo import PPOConfig, PPOTrainer

KL_COEF, LEARNING_RATE = 0.2, 1.0e-4


def main() -> None:
    volume = volume_of("peer-")
    scenarios = {f"ours-{s}": {"base": "tiny", "seed": s, "rlhf": {"run": {"threads": 1}}} for s in SEEDS}
    ready = [f"results/{name}/{what}" for name in scenarios for what in ("sft/actor", "reward/model")]
    snakemake(volume, scenarios, ready)
    snakemake(volume, scenarios, [f"results/{name}/rlhf/eval" for name in scenarios], "--cores", "1")
    torch.set_num_threads(1)
    for seed in SEEDS:
        results, ppo = volume / "results" / f"ours-{seed}", ppo_of(volume, f"ours-{seed}")
        report(results, f"ours-{seed}")
        theirs = volume / "results" / f"trl-{seed}"
        peers = train(volume, results, ppo, theirs / "rlhf", seed)
        compare(volume, results, theirs)
        report(theirs, f"trl-{seed}")
        whole, ours = seconds_per_sample(ppo), loop_seconds(volume, ppo)
        print(
            f"seconds per sample: ours {ours:.4f} (the whole job {whole:.4f}), TRL {peers:.4f}:"
            f" {ours / peers:.2f} of its time",
            flush=True,
        )


def train(volume: Path, results: Path, ppo: Path, output: Path, seed: int) -> float:
    """Train with TRL as `ppo` was trained, save the actor, and return the seconds per sample."""
    sft, reward = (results / name for name in ("sft/actor", "reward/model"))
    record = json.loads((ppo / "provenance.json").read_text())
    config, tokenizer = record["config"], load_tokenizer(sft)
    prompts = Rows(volume / record["parents"]["data"] / "train")
    dataset = Dataset.from_dict({"input_ids": [prompts[i][0].tolist() for i in range(len(prompts))]})
    tokenizer.padding_side = "left"
    trainer = PPOTrainer(
        args=settings(config, seed, output),
        processing_class=tokenizer,
        model=loading.load_actor(sft, torch.float32),
        ref_model=loading.load_actor(sft, torch.float32),
        reward_model=normalised(loading.load_scorer(reward, torch.float32), results),
        value_model=loading.load_scorer(reward, torch.float32),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(config["rollout_batch_size"])),
    )
    started = time.time()
    with redirect_stdout(sys.stderr):  # TRL prints every batch's metrics
        trainer.train()
    seconds = time.time() - started
    saving.save(trainer.policy_model, tokenizer, output / "actor", config["temperature"])
    return seconds / trainer.args.total_episodes


def loop_seconds(volume: Path, ppo: Path) -> float:
    """Return the seconds per sample of a training's iterations, states included, from what TensorBoard got."""
    board = EventAccumulator(str(volume / "logs/tensorboard/rlhf" / ppo.name)).Reload()
    config = json.loads((ppo / "provenance.json").read_text())["config"]
    return sum(event.value for event in board.Scalars("seconds")) / samples(config)


def settings(config: dict[str, Any], seed: int, output: Path) -> PPOConfig:
    """Return our values in TRL's words. Without accumulation: TRL would count mini-batches as parts of it."""
    return PPOConfig(
        output_dir=str(output),
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        num_sample_generations=0,
        stop_token="eos",
        total_episodes=samples(config),
        per_device_train_batch_size=config["rollout_batch_size"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=config["rollout_batch_size"],
        num_mini_batches=config["mini_batches"],
        num_ppo_epochs=config["ppo_epochs"],
        response_length=config["max_new_tokens"],
        temperature=config["temperature"],
        missing_eos_penalty=config["missing_eos_penalty"],
        gamma=config["gamma"],
        lam=config["gae_lambda"],
        cliprange=config["clip_range"],
        cliprange_value=config["value_clip_range"],
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
    )


def normalised(scorer: Any, results: Path) -> Any:
    """Return a reward model whose scores of SFT responses (those of the comparison) have mean 0 and sd 1."""
    lines = (results / "rlhf/eval/responses.jsonl").read_text().splitlines()
    scores = [json.loads(line)["before"]["score"] for line in lines]
    head = torch.nn.Linear(scorer.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(scorer.score.weight / pstdev(scores))
        head.bias.fill_(-fmean(scores) / pstdev(scores))
    scorer.score = head
    return scorer


def compare(volume: Path, results: Path, theirs: Path) -> None:
    """Compare responses before and after TRL's training, as ours were compared."""
    ours = (results / "rlhf/eval").resolve()
    spec = {k: v for k, v in json.loads((ours / "provenance.json").read_text()).items() if k != "files"}
    spec["parents"] = {**spec["parents"], "rlhf": str(theirs / "rlhf")}
    run = json.loads((ours / "run.json").read_text())["run"]
    script = PROJECT / "scripts" / "compare_responses.py"
    options = {"spec": json.dumps(spec), "run": json.dumps(run), "output": str(theirs / "rlhf/eval")}
    launch = [
        str(script.with_name("launch.py")),
        "--log",
        str(volume / "logs" / f"{theirs.name}.log"),
        str(script),
    ]
    command = [sys.executable, *launch, *(part for k, v in options.items() for part in (f"--{k}", v))]
    subprocess.run(command, cwd=volume, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
