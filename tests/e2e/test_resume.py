"""A stage that is killed and resumed makes the same bytes as one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_for

from rlhf.errors import RESUMABLE

ENTRY = {"sft": "train_sft.py", "reward": "train_reward.py", "rlhf": "train_ppo.py"}
RESULT = {"sft": "sft/actor", "reward": "reward/model", "rlhf": "rlhf/actor"}


def start(smoke, stage: str, published: Path, tmp_path: Path, **changes: int) -> subprocess.Popen:
    """Start a stage's script as its rule does, writing elsewhere; `changes` override its `run`."""
    provenance = json.loads((published / "provenance.json").read_text())
    spec = {name: provenance[name] for name in ("stage", "config", "parents", "code", "seed")}
    run = json.loads((published / "run.json").read_text())["run"] | changes
    command = [
        sys.executable,
        str(smoke.project / "scripts/launch.py"),
        "--processes",
        str(run["processes"]),
        "--log",
        str(tmp_path / "log"),
        str(smoke.project / "scripts" / ENTRY[stage]),
        "--spec",
        json.dumps(spec),
        "--run",
        json.dumps(run),
        "--output",
        str(tmp_path / "again"),
        "--work",
        str(tmp_path / "work"),
        "--board",
        str(tmp_path / "board"),
    ]
    return subprocess.Popen(command, cwd=smoke.volume, stderr=subprocess.DEVNULL, start_new_session=True)


def files(path: Path) -> dict[str, bytes]:
    """Return name -> content of an artefact's files, without the record of the run."""
    ignored = ("run.json", ".snakemake_timestamp")
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and p.name not in ignored
    }


def wait_for_states(process: subprocess.Popen, tmp_path: Path, count: int = 1) -> None:
    """Wait until a training has saved its state `count` times."""

    def saved() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        return len(list((tmp_path / "work").glob("step-*[0-9]"))) >= count

    wait_for(saved)


def kill_with_states(process: subprocess.Popen, tmp_path: Path, count: int = 1) -> None:
    wait_for_states(process, tmp_path, count)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_a_killed_stage_resumes_and_makes_the_same_bytes(smoke, stage, tmp_path):
    published = smoke.artefact(f"smoke/{RESULT[stage]}")
    process = start(smoke, stage, published, tmp_path)
    kill_with_states(process, tmp_path)
    assert not (tmp_path / "again").exists()
    (tmp_path / "work/metrics.jsonl").write_text('{"half a li')  # the state has its own
    assert start(smoke, stage, published, tmp_path).wait(timeout=600) == 0
    assert "resumed after step" in (tmp_path / "log").read_text()
    ours, theirs = files(tmp_path / "again"), files(published)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def stop(process: subprocess.Popen, tmp_path: Path, steps: int, to_all: bool) -> None:
    """Send SIGTERM once some steps are done; the state after the last step is saved, and no step is lost."""
    metrics = tmp_path / "work/metrics.jsonl"

    def done() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        return metrics.exists() and len(metrics.read_text().splitlines()) >= steps

    wait_for(done)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == RESUMABLE
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    said = f"stopped after step {last}, whose state is saved: the same command resumes from there"
    assert said in (tmp_path / "log").read_text()
    assert (tmp_path / f"work/step-{last:06d}/hashes.json").exists()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("stage", "to_all"), [("sft", False), ("rlhf", True)])
def test_a_stage_that_has_to_stop_loses_no_step(smoke, stage, to_all, tmp_path):
    published = smoke.artefact(f"smoke/{RESULT[stage]}")
    for steps in (1, 3):
        stop(start(smoke, stage, published, tmp_path, save_steps=10**6), tmp_path, steps, to_all)
    assert start(smoke, stage, published, tmp_path).wait(timeout=600) == 0
    assert (tmp_path / "log").read_text().count("resumed after step") == 2
    assert files(tmp_path / "again") == files(published)


def test_one_killed_process_of_two_ends_both_and_the_stage_resumes_with_the_same_bytes(smoke, tmp_path):
    published, two = (
        smoke.artefact("smoke/rlhf/actor"),
        {"processes": 2, "zero_stage": 2, "micro_batch_size": 16},
    )
    (tmp_path / "whole").mkdir()
    assert start(smoke, "rlhf", published, tmp_path / "whole", **two).wait(timeout=600) == 0
    process = start(smoke, "rlhf", published, tmp_path, **two)
    wait_for_states(process, tmp_path)
    os.kill(int((tmp_path / "work/lock").read_text().split()[1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "again").exists()
    done = len((tmp_path / "work/metrics.jsonl").read_text().splitlines())
    stop(start(smoke, "rlhf", published, tmp_path, **two), tmp_path, done + 1, to_all=True)  # both agree
    assert start(smoke, "rlhf", published, tmp_path, **two).wait(timeout=600) == 0
    assert "resumed after step" in (tmp_path / "log").read_text()
    ours, theirs = files(tmp_path / "again"), files(tmp_path / "whole/again")
    assert ours == theirs


def test_a_state_of_another_shard_layout_is_refused(smoke, tmp_path):
    published = smoke.artefact("smoke/sft/actor")
    kill_with_states(start(smoke, "sft", published, tmp_path), tmp_path)
    assert start(smoke, "sft", published, tmp_path, zero_stage=2).wait(timeout=600) == 2
    log = (tmp_path / "log").read_text()
    assert (
        "was saved with processes: 1, zero_stage: 0; the configuration says processes: 1, zero_stage: 2"
        in log
    )


def test_a_damaged_state_is_not_used_but_the_one_before_it_is(smoke, tmp_path):
    published = smoke.artefact("smoke/reward/model")
    kill_with_states(start(smoke, "reward", published, tmp_path), tmp_path, count=2)
    newest = sorted((tmp_path / "work").glob("step-*"))[-1]
    damaged = next((newest / "model").rglob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert start(smoke, "reward", published, tmp_path).wait(timeout=600) == 0
    assert "is damaged and not used" in (tmp_path / "log").read_text()
    assert files(tmp_path / "again") == files(published)


def test_a_second_process_on_the_same_state_is_refused(smoke, tmp_path):
    published = smoke.artefact("smoke/sft/actor")
    first = start(smoke, "sft", published, tmp_path)
    while not (tmp_path / "work/lock").exists():
        assert first.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(first.pid, signal.SIGSTOP)  # so that it does not end before the second one begins
    assert start(smoke, "sft", published, tmp_path).wait(timeout=600) == 2
    assert "makes the same artefact" in (tmp_path / "log").read_text()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
