"""Benchmark: samples per second of PPO on one GPU, at the shapes of `single-gpu`, with shares of time and memory.

    PYTHONPATH=scripts python tests/bench/ppo_gpu.py [CASE ...]

OPT-1.3B and OPT-350M with random weights of their exact shapes, prompts and responses of 256 tokens, no early
end. Figures are medians of at least five iterations after the first two. Beside it: `generate` of transformers
with a static cache, greedy, in the same run.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rlhf.config.scenario import load_config
from rlhf.data.rows import RowWriter
from rlhf.generation.sampling import Sampling
from rlhf.training import engine, ppo, rollout, state
from rlhf.training.paths import Paths

PROJECT = Path(__file__).resolve().parents[2]
ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
TOKENS, PAD, NEVER, ITERATIONS = 256, 1, -1, 8
CONFIG = load_config(yaml.safe_load((PROJECT / "config.yaml").read_text())).scenarios["single-gpu"].rlhf
# Name -> rollout batch size, micro-batch size, whether the actor has adapters, whether it is checkpointed.
CASES = {
    "as shipped": (16, 16, True, True),
    "all weights, batch 16": (16, 16, False, False),
    "all weights, batch 32": (32, 32, False, False),
    "all weights, batch 64": (64, 16, False, False),
}
SECONDS: dict[str, list[float]] = {}


def main() -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in ONE_PROCESS.items()})
    engine.start(CONFIG.run, CONFIG.dtype)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, {TOKENS} + {TOKENS} tokens, {CONFIG.dtype}")
    for module, name in ((rollout, "sample"), (rollout, "observe"), (ppo, "roll_out"), (ppo, "_update")):
        setattr(module, name, timed(name, getattr(module, name)))
    state.State.save = lambda *_: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for name in sys.argv[1:] or CASES:
            measure(Path(folder), name, *CASES[name])
        for rows in (16, 64):
            reference(Path(folder), rows)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same, and keeps its seconds with the GPU's work in them."""

    def run(*arguments: Any) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = function(*arguments)
        torch.cuda.synchronize()
        SECONDS.setdefault(name, []).append(time.perf_counter() - started)
        return result

    return run


def write_models(root: Path) -> None:
    """Write an actor, a scorer and prompts."""
    torch.manual_seed(0)
    wide = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
    narrow = {"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "word_embed_proj_dim": 512}
    with torch.device("cuda"):
        actor = OPTForCausalLM(OPTConfig(num_hidden_layers=24, **wide))
        scorer = OPTForSequenceClassification(
            OPTConfig(num_hidden_layers=24, do_layer_norm_before=False, num_labels=1, **narrow)
        )
    actor.to(torch.bfloat16).save_pretrained(root / "actor")
    scorer.to(torch.bfloat16).save_pretrained(root / "scorer")
    draw = np.random.default_rng(0)
    with RowWriter(root / "data/train", ("prompt",)) as rows:
        for _ in range(1024):
            rows.append([draw.integers(3, 50000, TOKENS)])


def measure(root: Path, name: str, batch: int, micro: int, adapters: bool, checkpointed: bool) -> None:
    """Train for some iterations; print samples per second and where an iteration's time goes."""
    SECONDS.clear()
    torch.cuda.reset_peak_memory_stats()
    sizes = {
        "micro_batch_size": micro,
        "generation_batch_size": batch,
        "gradient_checkpointing": checkpointed,
    }
    run = CONFIG.run.model_copy(update=sizes)
    changes: dict[str, Any] = {"iterations": ITERATIONS, "epochs": None, "run": run}
    changes |= {"rollout_batch_size": batch, "reward_samples": batch}
    config = CONFIG.model_copy(update=changes | ({} if adapters else {"actor_lora": None}))
    models = ppo.load(root / "actor", root / "scorer", config)
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(root / "data", Path(folder, "work"), Path(folder, "board"))
        ppo.train(models, config, Sampling(TOKENS, 1.0, NEVER, PAD), 1, paths)
        metrics = json.loads((paths.work / "metrics.jsonl").read_text().splitlines()[-1])
    # The first of `roll_out` is the calibration's.
    parts = {part: median(SECONDS[part][-(ITERATIONS - 2) :]) for part in SECONDS}
    seconds = parts["roll_out"] + parts["_update"]
    print(
        f"{name}: {batch / seconds:.1f} samples/s, {1000 * parts['sample'] / TOKENS:.2f} ms per token;"
        f" sampling {parts['sample']:.3f} s, other forwards {parts['observe']:.3f} s, update"
        f" {parts['_update']:.3f} s; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB;"
        f" sampler_kl {metrics['sampler_kl']:.1e}",
        flush=True,
    )
    del models
    gc.collect()
    torch.cuda.empty_cache()


def reference(root: Path, rows: int) -> None:
    """Print the time of transformers' own `generate`, with a static cache."""
    model = OPTForCausalLM.from_pretrained(root / "actor", dtype=torch.bfloat16).cuda().eval()
    ids = torch.randint(3, 50000, (rows, TOKENS), device="cuda")
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": PAD}
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(ids, cache_implementation="static", **options)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(f"generate of transformers, static cache, batch {rows}: {1000 * seconds / TOKENS:.2f} ms per token")


if __name__ == "__main__":
    main()
