"""From names on the Hub to a trained actor: the real Snakefile against a server with the Hub's protocol."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import datasets
import hub_content
import pytest
from conftest import Pipeline
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.rows import Rows

RUN = "{micro_batch_size: 8, threads: 1, save_steps: 10}"
SCENARIO = f"""
scenarios:
  hub: &hub
    base: tiny
    actor: {{model: facebook/opt-1.3b}}
    data: {{shares: {{sft: 2, reward: 4, rlhf: 4}}}}
    sft: &sft
      datasets: [Dahoas/rm-static, Dahoas/full-hh-rlhf, Dahoas/synthetic-instruct-gptj-pairwise]
      max_tokens: 100
      train_batch_size: 16
      steps: 6
      run: {RUN}
    reward: {{<<: *sft, model: facebook/opt-350m, epochs: null}}
    rlhf:
      datasets: [Dahoas/rm-static]
      max_prompt_tokens: 60
      max_new_tokens: 8
      iterations: 2
      rollout_batch_size: 16
      reward_samples: 16
      run: {RUN}
    eval: {{prompts: 16, max_new_tokens: 8}}
  other: {{base: hub, sft: {{steps: 7}}}}
"""


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return tmp_path_factory.mktemp("hub-volume")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    hub_content.seeds_repositories(root)
    return root


@pytest.fixture(scope="module")
def trained(volume, hub):
    """The pipeline after a run from the server, which is gone again."""
    pipeline = Pipeline(volume)
    with HubServer(hub) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.endpoint)
        pipeline.snakemake("results/hub/rlhf/actor", "results/hub/rlhf/eval", config=SCENARIO)
        pipeline.served = list(server.requests)
    return pipeline


def test_the_scenario_is_planned_without_a_network(empty):
    text = empty.snakemake("-n", "results/hub/rlhf/actor", config=SCENARIO).stdout
    assert "Pretrained model: facebook/opt-1.3b at main, from the Hub for hub" in text
    assert "Dataset: Dahoas/rm-static at main, from the Hub for hub" in text


def test_a_model_comes_out_and_only_what_is_needed_was_asked_for(trained):
    actor = AutoModelForCausalLM.from_pretrained(trained.volume / "results/hub/rlhf/actor")
    assert actor.config.hidden_size == 32
    files = [r.rpartition("/")[2] for r in trained.served if "/resolve/" in r]
    assert not [f for f in files if f.endswith((".h5", ".msgpack"))]
    assert len([r for r in trained.served if "/revision/" in r]) == 5


def test_the_350m_s_quirks_survive_into_the_reward_model(trained):
    path = trained.volume / "store/reward"
    scorer = AutoModelForSequenceClassification.from_pretrained(next(path.iterdir()) / "model")
    assert (scorer.config.word_embed_proj_dim, scorer.config.do_layer_norm_before) == (16, False)


def test_the_downloaded_model_carries_its_commit_and_no_pickle(trained):
    model = trained.volume / "models/facebook/opt-1.3b@main"
    source = json.loads((model / "provenance.json").read_text())["source"]
    recorded = json.loads((trained.volume / "rlhf.lock").read_text())
    assert recorded["models/facebook/opt-1.3b@main"] == source["commit"]
    assert not list(trained.volume.rglob("*.bin.part"))
    assert not list(model.glob("*.bin"))
    assert not list((trained.volume / "work").glob("*/*/*/files"))


def test_no_prompt_is_in_two_phases_and_the_card_counts_every_row(trained):
    rows = {
        "Dahoas/rm-static": 600,
        "Dahoas/full-hh-rlhf": 600,
        "Dahoas/synthetic-instruct-gptj-pairwise": 600,
    }
    prompts = {}
    for path in trained.volume.glob("store/data/*/card.json"):
        card = json.loads(path.read_text())
        for name, counts in card["datasets"].items():
            assert sum(counts.values()) == rows[name]
        prompts[card["phase"]] = {row[0].tobytes() for row in Rows(path.parent / "train")}
    assert len(prompts) == 3
    for a, b in combinations(prompts.values(), 2):
        assert not a & b


def test_without_the_server_there_is_nothing_to_do_and_another_scenario_trains(trained):
    assert trained.jobs("results/hub/rlhf/actor", config=SCENARIO) == {}
    trained.snakemake("results/other/sft/actor", config=SCENARIO + "\noffline: true\n")


def test_offline_a_missing_model_is_an_error_in_one_sentence(empty):
    run = empty.snakemake("-k", "results/hub/sft/actor", config=SCENARIO + "\noffline: true\n", check=False)
    text = run.stdout + run.stderr
    assert run.returncode == 1
    assert "model facebook/opt-1.3b is not on the volume, and nothing may be downloaded" in text
    assert "Traceback" not in text


def test_models_and_datasets_on_the_volume_are_used_without_a_download(empty, hub):
    """As the seed's users have them: a clone of the repository, `save_to_disk`, JSON lines."""
    (empty.volume / "models").mkdir()
    shutil.copytree(hub / "models/facebook/opt-1.3b", empty.volume / "models/opt-13b")
    rows = datasets.load_dataset(str(hub / "datasets/Dahoas/rm-static"), split="train")
    datasets.DatasetDict({"train": rows}).save_to_disk(empty.volume / "datasets/mine")
    rows.to_json(empty.volume / "more.jsonl")
    columns = "columns: {prompt: prompt, chosen: chosen, rejected: rejected, dialogue: true}"
    local = SCENARIO.replace("facebook/opt-1.3b", "./models/opt-13b").replace(
        "[Dahoas/rm-static, Dahoas/full-hh-rlhf, Dahoas/synthetic-instruct-gptj-pairwise]",
        f"[{{name: ./datasets/mine, {columns}}}, {{name: ./more.jsonl, {columns}}}]",
    )
    empty.snakemake("results/hub/sft/actor", config=local + "\noffline: true\n")
    assert (empty.volume / "models/opt-13b/pytorch_model-00001-of-00002.bin").exists()
    (card,) = empty.volume.glob("store/data/*/card.json")
    counts = json.loads(card.read_text())["datasets"]
    assert counts["./datasets/mine"] == counts["./more.jsonl"]


KILLS = 20


def test_a_download_that_is_killed_at_any_moment_ends_in_the_right_bytes(tmp_path):
    """Killed 20 times, at most one chunk is fetched twice each time, and no litter is left."""
    draw = random.Random(7)
    folder = tmp_path / "hub/datasets/a/b"
    folder.mkdir(parents=True)
    (folder / "train.data.json").write_text("{}")
    content = draw.randbytes(48 << 20)
    (folder / "train.parquet").write_bytes(content)
    volume = tmp_path / "volume"
    volume.mkdir()
    with HubServer(tmp_path / "hub") as server:
        server.pause = 0.001
        for kill in range(KILLS + 1):
            process = start_fetch(volume, server)
            if kill < KILLS:
                until = sum(n for _, _, n in server.sent) + draw.randrange(4 << 20)
                while process.poll() is None and sum(n for _, _, n in server.sent) < until:
                    time.sleep(0.002)
                process.send_signal(signal.SIGKILL)
            code = process.wait(timeout=120)
        sent = sum(n for name, _, n in server.sent if name == "train.parquet")
    assert code == 0
    made = volume / "datasets/a/b@main"
    assert (made / "files/train.parquet").read_bytes() == content
    assert [p.name for p in made.parent.iterdir()] == ["b@main"]
    assert not list(volume.rglob("*.part"))
    again = (sent - len(content)) / KILLS
    print(f"{again / 2**20:.2f} MiB fetched again per kill")
    assert again <= 32 << 20


def start_fetch(volume: Path, server: HubServer) -> subprocess.Popen:
    spec = {"stage": "dataset", "config": {"dataset": "a/b", "revision": "main"}, "parents": {}, "code": "x"}
    path = "datasets/a/b@main"
    script = Path(__file__).parents[2] / "scripts/fetch_dataset.py"
    command = [
        sys.executable,
        str(script),
        "--spec",
        json.dumps(spec),
        "--output",
        path,
        "--work",
        f"work/{path}",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=volume, env={**os.environ, "HF_ENDPOINT": server.endpoint}, **quiet)
