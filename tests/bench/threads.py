"""Benchmark: PPO iterations of `tiny` on two threads, alone and beside a busy process, by how OpenMP's threads wait.

    python tests/bench/threads.py [--iterations 20] [--threads 2]

By default threads spin for a while when they wait for each other; with passive waiting they sleep. Spinning is
quicker on an idle machine, and much slower where something else needs one of the cores: a brief spin is neither. Models have random
weights and prompts random tokens, of tiny's sizes: no response ends early. Seconds are medians over iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "math"))
import trainings
from launch import single_process

PROJECT = Path(__file__).resolve().parents[2]
WAITING = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "brief": {"GOMP_SPINCOUNT": "1000"},  # as `launch.py` sets it
}
ONE_PROCESS = {**single_process(), "DS_ACCELERATOR": "cpu"}


def child(root: Path, iterations: int, threads: int) -> None:
    """Train as the PPO stage of `tiny` does, and print the seconds of each iteration but the first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from rlhf.generation.sampling import Sampling
    from rlhf.training import engine, ppo
    from rlhf.training.paths import Paths

    config = tiny().rlhf
    run = config.run.model_copy(update={"threads": threads, "save_steps": iterations})
    config = config.model_copy(update={"iterations": iterations, "run": run})
    engine.start(config.run, config.dtype)
    models = ppo.load(root / "actor", root / "scorer", config)
    sampling = Sampling(config.max_new_tokens, config.temperature, trainings.EOS, trainings.PAD)
    with tempfile.TemporaryDirectory() as folder:
        paths = Paths(root / "data", Path(folder, "work"), Path(folder, "board"))
        ppo.train(models, config, sampling, trainings.SEED, paths).log.finish(Path(folder))
        board = EventAccumulator(str(paths.board)).Reload()
        print(json.dumps([event.value for event in board.Scalars("seconds")][1:]))


def tiny():
    """Return the scenario `tiny`."""
    from rlhf.config.scenario import load_config

    return load_config(yaml.safe_load((PROJECT / "config.yaml").read_text())).scenarios["tiny"]


def write_inputs(root: Path) -> None:
    """Write an actor, a reward model and prompts of the sizes that `tiny` has."""
    from rlhf.models import loading
    from rlhf.sources import builtin_opt

    scenario = tiny()
    builtin_opt.write_model({"model": scenario.actor.model, "seed": 1}, root / "actor")
    scorer = loading.new_scorer(root / "actor", torch.float32, trainings.PAD, seed=3)
    scorer.save_pretrained(root / "scorer")
    vocabulary = scorer.config.vocab_size
    trainings.write_rows(root / "data", "rlhf", vocabulary, longest=scenario.rlhf.max_prompt_tokens)


def seconds(root: Path, waiting: dict[str, str], iterations: int, threads: int) -> float:
    """Return the median seconds of an iteration, in a process of its own."""
    environment = {k: v for k, v in trainings.environment().items() if k not in WAITING["passive"]}
    command = [
        sys.executable,
        __file__,
        "--child",
        str(root),
        f"--iterations={iterations}",
        f"--threads={threads}",
    ]
    environment |= ONE_PROCESS | waiting
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    return median(json.loads(run.stdout.splitlines()[-1]))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many cores busy within this."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.iterations, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        found = {}
        for others in (0, 1):
            for name, waiting in WAITING.items():
                with busy(others):
                    found[name, others] = seconds(Path(folder), waiting, args.iterations, args.threads)
    print(
        f"PPO of tiny, {args.threads} threads, {len(os.sched_getaffinity(0))} cores, load"
        f" {os.getloadavg()[0]:.1f} at the end; seconds per iteration, median of {args.iterations - 1}"
    )
    print(f"{'waiting':<16} {'alone':>8} {'beside a busy process':>22} {'ratio':>6}")
    for name in WAITING:
        alone, beside = found[name, 0], found[name, 1]
        print(f"{name:<16} {alone:8.2f} {beside:22.2f} {beside / alone:6.2f}")
    alone, beside = (found["brief", n] / found["default", n] for n in (0, 1))
    print(f"{'brief/default':<16} {alone:8.2f} {beside:22.2f}")


if __name__ == "__main__":
    main()
