"""Benchmark the three stages on this machine's GPU, at the shapes of `single-gpu`.

    python scripts/bench.py [--json FILE] [CASE ...]

OPT-1.3B and OPT-350M with random weights of their exact shapes. SFT and reward model read rows of the
lengths of real conversations; PPO reads prompts of 256 tokens and writes responses of 256, without an early
end. Every case is trained by the product's own loop. Figures are medians of the steps after the warm-up.

"Of limit" compares with the time that this GPU would need if it multiplied matrices and read memory at the
rates that are measured first: model FLOPs over the matrix rate and, for decoding, bytes of weights and cache
over the copy rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from launch import single_process
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rlhf.config.scenario import load_config
from rlhf.config.stages import Rlhf, Training
from rlhf.data.rows import PARTS, RowWriter
from rlhf.generation.sampling import Sampling
from rlhf.models import loading
from rlhf.training import engine, ppo, reward, rollout, sft, state, supervised
from rlhf.training.paths import Paths

PROJECT = Path(__file__).resolve().parents[1]
TOKENS, PAD, NEVER = 256, 1, -1  # of a prompt and of a response; ids
WARM_UP, STEPS, ITERATIONS = 32, 48, 7
ACTOR = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
SCORER = {"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "word_embed_proj_dim": 512}
# Case -> its stage, and what differs from `single-gpu`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT, as shipped": ("sft", {}),
    "SFT, all weights, batch 64": ("sft", {"lora": None, "train_batch_size": 64}),
    "reward model, as shipped": ("reward", {}),
    "reward model, batch 64": ("reward", {"train_batch_size": 64}),
    "PPO, as shipped": ("rlhf", {}),
    "PPO, all weights, batch 16": ("rlhf", {"actor_lora": None}),
    "PPO, all weights, batch 32": ("rlhf", {"actor_lora": None, "rollout_batch_size": 32}),
    "PPO, all weights, batch 64": ("rlhf", {"actor_lora": None, "rollout_batch_size": 64}),
}


@dataclass
class Figures:
    """What is measured of one case. Rates are per second; PPO's samples are responses."""

    case: str
    samples: float  # rows, pairs or responses
    tokens: float  # real ones: padding does not count
    flops: float  # model FLOPs: without recomputation
    mfu: float  # `flops` over the matrix rate of this GPU
    of_limit: float  # time at the limits over time measured
    peak_gib: float
    seconds: dict[str, float]  # of one step or iteration, by part
    ms_per_token: float | None = None  # of decoding, the pass over prompts included
    sampler_kl: float | None = None
    gpu: dict[str, float] | None = None  # milliseconds of kernels in one step, by their use


@dataclass(frozen=True)
class Limits:
    """Rates of this GPU, measured."""

    copy: float  # bytes read and written per second
    matrix: float  # FLOP per second of an 8192^3 product in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU: this benchmark needs one")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.update(single_process())
    config = load_config(yaml.safe_load((PROJECT / "config.yaml").read_text())).scenarios["single-gpu"]
    engine.start(config.sft.run, config.sft.dtype)
    limits, found = measured_limits(), []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {TOKENS} + {TOKENS} tokens in PPO"
    )
    print(f"copy {limits.copy / 1e12:.2f} TB/s, matrix product {limits.matrix / 1e12:.0f} TFLOP/s")
    state.State.save = lambda *_: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_models(root)
        for case in args.cases or CASES:
            stage, changes = CASES[case]
            measure = ppo_figures if stage == "rlhf" else supervised_figures
            with redirect_stdout(sys.stderr):  # DeepSpeed prints what its optimizer needs
                found.append(measure(case, changed(getattr(config, stage), changes), root, limits))
            print(text(found[-1]), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        references = {rows: reference(root, rows) for rows in (16, 64)}
    for rows, milliseconds in references.items():
        print(f"generate of transformers, static cache, batch {rows}: {milliseconds:.2f} ms per token")
    if args.json:
        content = {"limits": asdict(limits), "cases": [asdict(f) for f in found], "generate": references}
        args.json.write_text(json.dumps(content, indent=1))


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return a stage's configuration with other values, and as long as the benchmark."""
    if isinstance(config, Rlhf):
        batch = changes.get("rollout_batch_size", config.rollout_batch_size)
        changes = changes | {"iterations": ITERATIONS, "epochs": None, "reward_samples": batch}
    else:
        changes = changes | {"steps": STEPS, "epochs": None, "eval_rows": 8}
    return config.model_copy(update=changes)


def text(figures: Figures) -> str:
    """Return a line for a case, and one for its kernels."""
    parts = [f"{figures.case}: {figures.samples:.1f} samples/s", f"{figures.tokens:,.0f} tokens/s"]
    if figures.ms_per_token:
        parts.append(f"{figures.ms_per_token:.2f} ms per token")
    parts += [f"MFU {100 * figures.mfu:.0f}%", f"{100 * figures.of_limit:.0f}% of limit"]
    parts += [f"{name} {1000 * s:.0f} ms" for name, s in figures.seconds.items()]
    parts.append(f"peak {figures.peak_gib:.1f} GiB")
    if figures.sampler_kl is not None:
        parts.append(f"sampler_kl {figures.sampler_kl:.1e}")
    kernels = ", ".join(f"{use} {ms:.1f}" for use, ms in (figures.gpu or {}).items())
    return ", ".join(parts) + (f"\n    GPU, ms of one step: {kernels}" if kernels else "")


# -- limits and references --------------------------------------------------------------------------------


def measured_limits() -> Limits:
    """Measure how fast this GPU copies memory and multiplies matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copied = min(seconds_of(lambda: target.copy_(source)) for _ in range(20))
    multiplied = min(seconds_of(lambda: matrix @ matrix) for _ in range(20))
    return Limits(2 * source.numel() / copied, 2 * 8192**3 / multiplied)


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, with the GPU's work in them."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def reference(root: Path, rows: int) -> float:
    """Return milliseconds per token of transformers' own `generate`, with a static cache, greedy."""
    model = OPTForCausalLM.from_pretrained(root / "actor", dtype=torch.bfloat16).cuda().eval()
    ids = torch.randint(3, 50000, (rows, TOKENS), device="cuda")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "cache_implementation": "static"}
    options |= {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    return 1000 * [seconds_of(lambda: model.generate(ids, **options)) for _ in range(2)][-1] / TOKENS


# -- models and rows ------------------------------------------------------------------------------------


def write_models(root: Path) -> None:
    """Write an actor, a scorer, rows of every stage."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        actor = OPTForCausalLM(OPTConfig(num_hidden_layers=24, **ACTOR))
        scorer = OPTForSequenceClassification(
            OPTConfig(num_hidden_layers=24, do_layer_norm_before=False, num_labels=1, **SCORER)
        )
    actor.to(torch.bfloat16).save_pretrained(root / "actor")
    scorer.to(torch.bfloat16).save_pretrained(root / "scorer")
    noise = np.random.default_rng(0)
    for stage, parts in PARTS.items():
        for split in ("train", "eval"):
            with RowWriter(root / stage / split, parts) as rows:
                for _ in range(64 * STEPS):
                    prompt = TOKENS if stage == "rlhf" else length(noise, 150, 110, 8, 400)
                    sizes = [prompt, *(length(noise, 55, 50, 4, 110) for _ in parts[1:])]
                    rows.append([noise.integers(3, 50000, n) for n in sizes])


def length(noise: np.random.Generator, mean: float, sd: float, least: int, most: int) -> int:
    """Return a log-normal length of a mean and sd, cut to a range."""
    variance = np.log(1 + (sd / mean) ** 2)
    found = noise.lognormal(np.log(mean) - variance / 2, np.sqrt(variance))
    return min(max(round(found), least), most)


def parameters(model: Any) -> int:
    """Return the weights that a token is multiplied with: matrices, but for embeddings that only look up."""
    inner = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    head = model.get_output_embeddings() if model.can_generate() else None
    return inner + (head.weight.numel() if head is not None else 0)


# -- stages ---------------------------------------------------------------------------------------------


def supervised_figures(case: str, config: Training, root: Path, limits: Limits) -> Figures:
    """Train SFT or the reward model for `STEPS` steps."""
    is_sft = not hasattr(config, "model")
    width = config.max_tokens if config.run.packing else None
    path, load = (root / "actor", loading.load_actor) if is_sft else (root / "scorer", loading.load_scorer)
    model = load(path, engine.DTYPES[config.dtype])
    task = (sft if is_sft else reward).task(PAD, width)
    # A frozen weight has no gradient of its own.
    per_token = (4 if config.lora else 6) * parameters(model)
    step = supervised._step
    steps, ends, gpu = list[supervised.Step](), list[float](), dict[str, float]()

    def measured(task: Any, trained: Any, content: supervised.Step) -> Any:
        result: list[Any] = []
        run = lambda: result.append(step(task, trained, content))  # noqa: E731
        if len(steps) == STEPS - 1:
            gpu.update(kernel_times(run))
        else:
            seconds_of(run)
        steps.append(content)
        ends.append(time.perf_counter())  # from one to the next: all that a step costs
        return result[0]

    torch.cuda.reset_peak_memory_stats()
    supervised._step = measured
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = Paths(root / ("sft" if is_sft else "reward"), Path(folder, "work"), Path(folder, "board"))
            supervised.train(task, model, config, 1, paths)
    finally:
        supervised._step = step
    seconds = np.diff(ends)[WARM_UP:-1]
    counted = steps[WARM_UP + 1 : -1]
    samples = median(content.rows / s for content, s in zip(counted, seconds, strict=True))
    tokens = median(content.tokens / s for content, s in zip(counted, seconds, strict=True))
    flops = tokens * per_token
    return Figures(
        case, samples, tokens, flops, flops / limits.matrix, flops / limits.matrix, peak(),
        {"step": float(median(seconds))}, gpu=gpu,
    )  # fmt: skip


def ppo_figures(case: str, config: Rlhf, root: Path, limits: Limits) -> Figures:
    """Train PPO for `ITERATIONS` iterations; the first two do not count."""
    seconds: dict[str, list[float]] = {}
    patched = [(rollout, "sample"), (rollout, "observe"), (ppo, "roll_out"), (ppo, "_optimize")]
    originals = [getattr(module, name) for module, name in patched]
    for (module, name), function in zip(patched, originals, strict=True):
        setattr(module, name, timed(function, seconds.setdefault(name, [])))
    torch.cuda.reset_peak_memory_stats()
    models = ppo.load(root / "actor", root / "scorer", config)
    actor, scorer = models.actor, models.critic
    weights, narrow = parameters(actor), parameters(scorer)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = Paths(root / "rlhf", Path(folder, "work"), Path(folder, "board"))
            ppo.train(models, config, Sampling(TOKENS, 1.0, NEVER, PAD), 1, paths)
            metrics = json.loads((paths.work / "metrics.jsonl").read_text().splitlines()[-1])
    finally:
        for (module, name), function in zip(patched, originals, strict=True):
            setattr(module, name, function)
    part = {name: median(values[-(ITERATIONS - 2) :]) for name, values in seconds.items()}
    total, batch = part["roll_out"] + part["_optimize"], config.rollout_batch_size
    tokens = 2 * TOKENS * batch
    trained = (4 if config.actor_lora else 6) * weights + 6 * narrow
    flops = tokens * (trained + 2 * (2 * weights + 2 * narrow) + 2 * weights)  # updates, forwards, sampling
    read = TOKENS * (2 * weights + batch * 1.5 * TOKENS * 4 * actor.config.hidden_size * 24)  # bytes, bf16
    # Decoding is bound by memory, all else by arithmetic.
    least = read / limits.copy + (flops - 2 * weights * TOKENS * batch) / limits.matrix
    return Figures(
        case, batch / total, tokens / total, flops / total, flops / total / limits.matrix, least / total, peak(),
        {"sampling": part["sample"], "forwards": part["observe"], "update": part["_optimize"]},
        1000 * part["sample"] / TOKENS, metrics["sampler_kl"],
    )  # fmt: skip


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a function that does the same, and appends its seconds."""

    def run(*arguments: Any) -> Any:
        result: list[Any] = []
        seconds.append(seconds_of(lambda: result.append(function(*arguments))))
        return result[0]

    return run


def peak() -> float:
    """Return the peak memory of tensors since the last reset, in GiB, and of what graphs use in replays."""
    in_graphs = sum(
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if segment["segment_pool_id"] != (0, 0) and block["state"] == "inactive"
    )
    return (torch.cuda.max_memory_allocated() + in_graphs) / 2**30


KERNELS = {
    "attention": ("flash", "fmha", "attention", "_decode"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma"),
    "optimizer": ("adam", "multi_tensor", "lpnorm"),
}


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds of a call's kernels by their use, and those in which the GPU waited."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        wall = 1000 * seconds_of(run)
    times = dict.fromkeys((*KERNELS, "other kernels"), 0.0)
    for event in found.key_averages():
        name = event.key.lower()
        use = next((use for use, words in KERNELS.items() if any(w in name for w in words)), "other kernels")
        times[use] += event.self_device_time_total / 1000
    return times | {"waiting": max(0.0, wall - sum(times.values()))}


if __name__ == "__main__":
    main()
