"""Benchmark: useful tokens per second of step 1, packed and padded, on texts of real lengths.

    python scripts/launch.py --log /tmp/packing.log tests/bench/packing.py

Prompts are log-normal, mean 150, sd 110, 8 to 400 tokens; responses mean 55, sd 50, 4 to 110. Every
path sees the same rows in the same batches and does the same optimizer steps; a useful token is one of a
prompt or a response. `padded` pads a micro-batch to its longest row; `padded, grouped` does so after
sorting rows by length within the batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

from rlhf import config, engine, packing, parallel, sft, supervised
from rlhf.batch import BatchPlan

SPEC = importlib.util.spec_from_file_location("trainings", Path(__file__).parents[1] / "math/trainings.py")
trainings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trainings)
PAD, MAX_TOKENS = 1, 512
OPTIMIZER = config.Optimizer(
    learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=1.0,
    schedule="constant", warmup_steps=0, final_ratio=1.0,
)  # fmt: skip


def lengths(draw: np.random.Generator, count: int, mean: float, sd: float, least: int, most: int):
    """Return log-normal lengths of a mean and sd, cut to a range."""
    variance = np.log(1 + (sd / mean) ** 2)
    found = draw.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return found.round().astype(int).clip(least, most)


def rows(count: int, vocabulary: int) -> list[list[np.ndarray]]:
    """Return prompts and responses of random tokens."""
    draw = np.random.default_rng(1)
    both = zip(lengths(draw, count, 150, 110, 8, 400), lengths(draw, count, 55, 50, 4, 110), strict=True)
    return [[draw.integers(3, vocabulary, n).astype(np.int32) for n in pair] for pair in both]


def speed(trained, data, args, width: int | None, *, grouped: bool) -> float:
    """Return useful tokens per second over all steps but the first."""
    task = sft.task(PAD, width)
    batches = [data[i : i + args.batch] for i in range(0, args.batch * args.steps, args.batch)]
    if grouped:
        batches = [sorted(batch, key=lambda row: sum(map(len, row))) for batch in batches]
    for number, batch in enumerate(batches):
        if number == 1:
            started = now()
        supervised._step(task, trained, batch, args.micro)
    return sum(len(part) for batch in batches[1:] for row in batch for part in row) / (now() - started)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("hidden", 256), ("layers", 4), ("vocabulary", 8192), ("batch", 64), ("micro", 16),
                        ("steps", 6), ("threads", 2)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    changes = {"run": {"micro_batch_size": args.micro, "threads": args.threads}}
    run = trainings.settings("sft", changes).run
    engine.start(run, args.dtype)
    torch.manual_seed(0)
    with parallel.device():  # where weights are drawn quickly
        model = OPTForCausalLM(OPTConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, word_embed_proj_dim=args.hidden,
            ffn_dim=4 * args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
            max_position_embeddings=MAX_TOKENS, dropout=0.0,
        )).to(engine.DTYPES[args.dtype])  # fmt: skip
    batch = BatchPlan(args.batch, args.micro, 1, args.batch // args.micro)
    trained = engine.initialise(model, OPTIMIZER, None, batch, args.dtype, 1000, run)
    data = rows(args.batch * args.steps, args.vocabulary)
    paths = {"padded": (None, False), "padded, grouped": (None, True), "packed, mask": (MAX_TOKENS, False)}
    speeds = {
        name: speed(trained, data, args, width, grouped=grouped) for name, (width, grouped) in paths.items()
    }
    packing.choose(model, args.dtype)
    if packing.by_kernel(model):
        speeds["packed, kernels"] = speed(trained, data, args, MAX_TOKENS, grouped=False)
    mean = np.mean([sum(map(len, row)) for row in data])
    print(f"{parallel.device()}, {args.dtype}, OPT {args.layers} x {args.hidden}, {args.batch} rows a step in"
          f" micro-batches of {args.micro}, {mean:.0f} tokens a row on average")  # fmt: skip
    for name, found in speeds.items():
        print(f"{name:<16} {found:9,.0f} useful tokens/s   {found / speeds['padded']:.2f}")


if __name__ == "__main__":
    main()
