"""Benchmark: useful tokens per second of SFT, packed and padded, on texts of real lengths.

    python scripts/launch.py --log /tmp/packing.log tests/bench/packing.py

Prompts are log-normal, mean 150, sd 110, 8 to 400 tokens; responses mean 55, sd 50, 4 to 110. A useful token
is one of a prompt or a response. `padded` pads a micro-batch to its longest row; `packed` sees the same rows in
the same batches. `padded, as trained` has its batches from `order.batch`: rows of similar length. It fails if
packing has less than 1.6 times the useful tokens per second of `padded`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

from rlhf import parallel
from rlhf.config import training
from rlhf.config.batch import BatchPlan
from rlhf.data import order
from rlhf.models import packing
from rlhf.training import engine, sft, supervised

sys.path.insert(0, str(Path(__file__).parents[1] / "math"))
import trainings

PAD, MAX_TOKENS, LEAST = 1, 512, 1.6
WINDOW = 32  # batches within which a training groups rows by length
OPTIMIZER = training.Optimizer(
    learning_rate=1e-4,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    eps=1e-8,
    max_grad_norm=1.0,
    schedule="constant",
    warmup_steps=0,
    final_ratio=1.0,
)


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


def speeds(trained, ways: dict[str, tuple[list, int | None]], micro: int) -> dict[str, float]:
    """Return useful tokens per second of each way: name -> its batches of rows, and to what they are packed.

    The ways take turns, so that other load on the machine slows all of them. First batches do not count.
    """
    seconds = dict.fromkeys(ways, 0.0)
    for number in range(len(next(iter(ways.values()))[0])):
        for name, (batches, width) in ways.items():
            started = now()
            task, batch = sft.task(PAD, width), batches[number]
            parts = [task.arrange(batch[start : start + micro]) for start in range(0, len(batch), micro)]
            supervised._step(task, trained, supervised.Step(len(batch), 0, task.terms(batch), parts))
            seconds[name] += now() - started if number else 0.0
    useful = {
        name: sum(len(part) for batch in batches[1:] for row in batch for part in row)
        for name, (batches, _) in ways.items()
    }
    return {name: useful[name] / seconds[name] for name in ways}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    args = arguments()
    run = trainings.settings(
        "sft",
        {
            "train_batch_size": args.batch,
            "run": {"micro_batch_size": args.micro, "threads": args.threads},
        },
    ).run
    engine.start(run, args.dtype)
    torch.manual_seed(0)
    model = new_model(args)
    batch = BatchPlan(args.batch, args.micro, 1, args.batch // args.micro)
    trained = engine.initialize(model, engine.Recipe(OPTIMIZER, None, batch, 1000, args.dtype, run))
    data = rows(args.batch * WINDOW, args.vocabulary)
    tokens = np.array([sum(map(len, row)) for row in data])
    print(
        f"{parallel.device()}, {args.dtype}, OPT {args.layers} x {args.hidden}, {args.batch} rows a step in"
        f" micro-batches of {args.micro}, {tokens.mean():.0f} tokens a row on average"
    )
    as_they_come, by_length = batches(data, tokens, args.batch, args.steps)
    ways = {
        "padded": (as_they_come, None),
        "padded, as trained": (by_length, None),
        "packed, mask": (as_they_come, MAX_TOKENS),
    }
    found = speeds(trained, ways, args.micro)
    packing.choose_attention(model, args.dtype)
    if packing.uses_kernel(model):
        found |= speeds(trained, {"packed, kernels": (as_they_come, MAX_TOKENS)}, args.micro)
    report(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (
        ("hidden", 256),
        ("layers", 4),
        ("vocabulary", 8192),
        ("batch", 32),
        ("micro", 16),
        ("steps", 6),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="fp32")
    return parser.parse_args()


def new_model(args: argparse.Namespace) -> OPTForCausalLM:
    """Return an OPT with random weights."""
    config = OPTConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=MAX_TOKENS,
        dropout=0.0,
    )
    with parallel.device():  # where weights are drawn quickly
        return OPTForCausalLM(config).to(engine.DTYPES[args.dtype])


def batches(data: list, tokens: np.ndarray, size: int, steps: int) -> tuple[list, list]:
    """Return the batches of every step: rows as they come, and rows of similar length as in a training."""
    chosen = [order.stream(len(data), 1, step * size, size) for step in range(steps)]
    grouped = [order.batch(tokens, size, step, steps, 1, WINDOW) for step in range(steps)]
    as_they_come, by_length = ([[data[i] for i in rows] for rows in way] for way in (chosen, grouped))
    return as_they_come, by_length


def report(found: dict[str, float]) -> None:
    """Print the speeds, and exit with an error if packing does not pay."""
    for name, speed in found.items():
        print(f"{name:<20} {speed:9,.0f} useful tokens/s   {speed / found['padded']:.2f}")
    *_, packed = found.values()  # as `packing.choose_attention` has it
    if packed < LEAST * found["padded"]:
        sys.exit(f"packing does less than {LEAST} times the useful tokens per second of padding")


if __name__ == "__main__":
    main()
