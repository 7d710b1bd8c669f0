"""Small trainings in one launch of processes: `launch.py --processes N trainings.py CASES.json`.

Each case names a stage and what differs from `base`; its metrics and its model go to a directory of
its name. Not a test: `test_processes.py`, `test_families.py` and `tests/gpu` compare what comes out.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from launch import single_process

from rlhf import parallel
from rlhf.config import stages, training
from rlhf.config.overrides import merge
from rlhf.data import tokens
from rlhf.data.rows import PARTS, RowWriter
from rlhf.generation.sampling import Sampling
from rlhf.models import loading, saving, sharding
from rlhf.training import engine, ppo, reward, sft, supervised
from rlhf.training.paths import Paths
from rlhf.training.state import State
from rlhf.training.wrapped import unwrap

FILE = Path(__file__).parents[2] / "config.yaml"
SCRIPTS = FILE.parent / "scripts"
PAD, EOS, SEED = 1, 2, 7
SHARD_BYTES = 10_000
RUN = {"processes": 1, "threads": 1, "save_steps": 5, "micro_batch_size": 4}
BASE = {
    "sft": {"steps": 10, "train_batch_size": 16, "eval_rows": 100, "run": RUN},
    "reward": {"steps": 10, "epochs": None, "train_batch_size": 16, "eval_rows": 100, "run": RUN},
    "rlhf": {
        "iterations": 2,
        "rollout_batch_size": 16,
        "reward_samples": 16,
        "max_new_tokens": 8,
        "run": {**RUN, "generation_batch_size": 8, "save_steps": 1},
    },
}


def settings(stage: str, changes: dict) -> training.Section:
    """Return a stage's section of the built-in scenario, made small, with a case's changes."""
    tree = yaml.safe_load(FILE.read_text())
    merged = merge(merge(tree["defaults"][stage], BASE[stage]), changes)
    if merged["dtype"] == "fp16":  # a user needs GPUs for it; here CPUs do what they do, see `main`
        merged = merge(merged, {"run": {"gpus": merged["run"]["processes"]}})
    return {"sft": stages.Sft, "reward": stages.Reward, "rlhf": stages.Rlhf}[stage].model_validate(merged)


def write_rows(path: Path, stage: str, vocabulary: int, longest: int = 12) -> None:
    """Write random rows for training and evaluation; evaluation does not divide into equal shares."""
    for split, count, seed in (("train", 64, 1), ("eval", 70, 2)):
        draw = np.random.default_rng([seed, len(PARTS[stage])])
        with RowWriter(path / split, PARTS[stage]) as out:
            for _ in range(count):
                lengths = draw.integers(2, longest, len(PARTS[stage]))
                out.append([draw.integers(3, vocabulary, n).tolist() for n in lengths])


def run(case: dict, sources: dict[str, Path], where: Path) -> None:
    """Train one case; save its models, adapters and metrics below `where`, and how they were made."""
    config = settings(case["stage"], case.get("changes", {}))
    work = where / "work"
    before = memory_mib()
    with (
        warnings_in(where / "warnings.txt"),
        watching(engine, "initialize") as engines,
        watching(engine, "frozen") as frozen,
        watching(tokens, "pack") as packs,
    ):
        metrics, trained = train(case["stage"], config, sources, work, where)
    peak = memory_mib()
    for role, (model, adapters) in trained.items():
        save(model, where / role)
        if adapters and adapters.only:
            base = sources["scorer" if role == "critic" else "actor"]
            saving.save_adapter(model, adapters, str(base), where / f"{role}_adapter")
    if config.run.zero_stage == 3:
        shards = where / "shards"
        if parallel.rank() == 0:
            shards.mkdir()
        parallel.barrier()
        sharding.write_shards(trained["model"][0], shards, SHARD_BYTES)
    if parallel.rank() == 0:
        done = {
            "run": config.run.model_dump(mode="json"),
            "engines": [described(e) for e in engines],
            "frozen": [described(e) for e in frozen],
            "packs": [[len(p.ends), len(p.ids)] for p in packs],
        }
        (where / "done.json").write_text(json.dumps(done))
        (where / "measured.json").write_text(json.dumps(metrics))
        (where / "memory.json").write_text(json.dumps({"before_mib": before, "peak_mib": peak}))
        shutil.copy(work / "metrics.jsonl", where / "metrics.jsonl")
    if case.get("again"):
        resume(case["stage"], config, sources, work, where / "again")
    parallel.barrier()
    if parallel.rank() == 0:
        learned = sum(
            p.numel() for model, _ in trained.values() for p in model.parameters() if p.requires_grad
        )
        (where / "state.json").write_text(json.dumps([saved_numbers(work), learned]))
        shutil.rmtree(work)


@contextmanager
def warnings_in(path: Path):
    """Write the library's warnings on rank 0 inside of the block to a file."""
    logger = logging.getLogger("rlhf")
    if parallel.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.addHandler(logging.FileHandler(path))
    try:
        yield
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def watching(owner, name: str):
    """Give a list of what calls of `owner.name` return inside of the block."""
    returned, function = [], getattr(owner, name)
    setattr(owner, name, lambda *args, **named: returned.append(function(*args, **named)) or returned[-1])
    try:
        yield returned
    finally:
        setattr(owner, name, function)


def described(wrapped) -> dict:
    """Return how an engine, or a model that only computes, is run, in the configuration's words."""
    if not hasattr(wrapped, "zero_optimization_stage"):
        return {"zero_stage": 0, "offload": []}
    zero, adam = wrapped.optimizer, getattr(wrapped, "basic_optimizer", None)
    flags = {
        "optimizer": ("cpu_offload", "offload_optimizer"),
        "parameters": ("offload_param", "offload_device"),
    }
    return {
        "zero_stage": wrapped.zero_optimization_stage(),
        "offload": [what for what, names in flags.items() if any(getattr(zero, n, None) for n in names)],
        "gradient_checkpointing": unwrap(wrapped).is_gradient_checkpointing,
        "moments_on": sorted({s["exp_avg"].device.type for s in getattr(adam, "state", {}).values()}),
    }


def memory_mib() -> float:
    """Return this process's peak so far: allocated on a GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def loss(task, model, rows):
    """Return a task's loss of some rows."""
    return task.loss(model, task.arrange(rows))


def saved_numbers(work: Path) -> int:
    """Return how many numbers the weights in the newest state have, where one file has all of a model."""
    newest = sorted(work.glob("step-*"))[-1]
    models = [torch.load(f, weights_only=False) for f in newest.glob("*/state/mp_rank_00_model_states.pt")]
    return sum(weight.numel() for model in models for weight in model["module"].values())


def resume(stage: str, config: training.Section, sources: dict[str, Path], work: Path, where: Path) -> None:
    """Lose the newest state, as if killed before it was saved; train on from the one before."""
    if parallel.rank() == 0:  # elsewhere, since this process still holds the lock of `work`
        shutil.copytree(work, where / "work", ignore=shutil.ignore_patterns("lock"))
        shutil.rmtree(sorted((where / "work").glob("step-*"))[-1])
    parallel.barrier()
    work = where / "work"
    with watching(State, "load") as loaded:
        _, trained = train(stage, config, sources, work, where)
    assert loaded[0] is not None, "it started from the beginning, which gives the same bytes"
    for role, (model, _) in trained.items():
        save(model, where / role)
    if parallel.rank() == 0:
        shutil.copy(work / "metrics.jsonl", where / "metrics.jsonl")


def train(stage: str, config: training.Section, sources: dict[str, Path], work: Path, where: Path):
    """Train as the stage's entry script does; return its metrics, and role -> a model and its LoRA."""
    dtype, actor, data = engine.DTYPES[config.dtype], sources["actor"], sources["data"]
    paths = Paths(data / stage, work, where / "board", ptx=data / "sft" if stage == "rlhf" else None)
    if stage == "rlhf":
        models = ppo.load(actor, sources["scorer"], config)
        sampling = Sampling(config.max_new_tokens, config.temperature, EOS, PAD)
        trained = ppo.train(models, config, sampling, SEED, paths)
        if trained.ema:
            with trained.ema.applied():
                save(models.actor, where / "model_ema")
        roles = {"model": (models.actor, config.actor_lora), "critic": (models.critic, config.critic_lora)}
        return trained.metrics, roles
    with engine.loading(actor, config.dtype, sharded=config.run.zero_stage == 3):
        if stage == "reward":
            model = loading.new_scorer(actor, dtype, PAD, SEED)
        else:
            model = loading.load_actor(actor, dtype)
    width = {"sft": 1, "reward": 2}[stage] * config.max_tokens if config.run.packing else None
    task = {"sft": sft, "reward": reward}[stage].task(PAD, width)
    return supervised.train(task, model, config, SEED, paths).metrics, {"model": (model, config.lora)}


class NoTokenizer:
    """Takes the place of a tokenizer when a model is saved: these models have none."""

    bos_token_id, eos_token_id, pad_token_id = 0, EOS, PAD

    def save_pretrained(self, path: Path) -> None:
        """Write nothing."""


def launch(path: Path, processes: int, sources: dict[str, Path], cases: list[dict], gpus: int = 0) -> Path:
    """Run cases in one launch of `processes` processes; return the directory with what they made."""
    log, plan = path / "log", write_plan(path, processes, sources, cases)
    command = [
        sys.executable,
        str(SCRIPTS / "launch.py"),
        "--processes",
        str(processes),
        "--gpus",
        str(gpus),
        "--log",
        str(log),
        __file__,
        str(plan),
    ]
    run = subprocess.run(command, env=environment(), stderr=subprocess.DEVNULL, check=False)
    assert run.returncode == 0, log.read_text()[-6000:]
    return path / "out"


def side_by_side(path: Path, sources: dict[str, Path], cases: list[dict], processes: int) -> dict[str, Path]:
    """Share cases out to trainings of one process each that run at once; return name -> what a case made.

    They share the GPU, if there is one: `launch.py` is not used. A case that fails leaves its error in
    `error.txt`; the others continue.
    """
    shares = [cases[i::processes] for i in range(processes)]
    places = [path / f"share-{i}" for i in range(processes)]
    started = []
    for where, share in zip(places, shares, strict=True):
        where.mkdir()
        plan = write_plan(where, 1, sources, share, each=True)
        with (where / "log").open("wb") as log:
            command = [sys.executable, __file__, str(plan)]
            started.append(
                subprocess.Popen(
                    command, env=environment() | single_process(), stdout=log, stderr=subprocess.STDOUT
                )
            )
    for where, process in zip(places, started, strict=True):
        assert process.wait() == 0, (where / "log").read_text()[-6000:]
    return {
        c["name"]: where / "out" / c["name"]
        for where, share in zip(places, shares, strict=True)
        for c in share
    }


def write_plan(
    path: Path, processes: int, sources: dict[str, Path], cases: list[dict], *, each: bool = False
) -> Path:
    """Write what `main` reads; with `each` a case that fails does not end the others."""
    for case in cases:
        case["changes"] = merge(case.get("changes", {}), {"run": {"processes": processes}})
    named = {name: str(p) for name, p in sources.items()}
    plan = {"sources": named, "out": str(path / "out"), "cases": cases, "each": each}
    (path / "cases.json").write_text(json.dumps(plan))
    return path / "cases.json"


def environment() -> dict[str, str]:
    """Return an environment in which a process finds the library."""
    paths = [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def save(model, path: Path) -> None:
    saving.save(model, NoTokenizer(), path)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    first = settings(plan["cases"][0]["stage"], plan["cases"][0].get("changes", {}))
    # DeepSpeed trains in fp16 on CPUs with kernels for it; others only are slow.
    get_accelerator().is_fp16_supported = lambda: True
    engine.start(first.run, first.dtype)
    for case in plan["cases"]:
        sources = {name: Path(path) for name, path in {**plan["sources"], **case.get("sources", {})}.items()}
        where = Path(plan["out"], case["name"])
        try:
            run(case, sources, where)
        except Exception:
            if not plan["each"]:
                raise
            where.mkdir(parents=True, exist_ok=True)
            (where / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
