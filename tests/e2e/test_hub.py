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
from itertools import combinations, pairwise
from pathlib import Path

import datasets
import hub_content
import pytest
from conftest import Pipeline
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.rows import Rows

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
  other: {{base: hub, sft: {{steps: 1}}, reward: {{steps: 1}}, rlhf: {{iterations: 1}}}}
"""


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return tmp_path_factory.mktemp("hub-volume")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    hub_content.deepspeed_chats_repositories(root)
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


def test_an_actor_is_built_and_only_needed_files_are_requested(trained):
    actor = AutoModelForCausalLM.from_pretrained(trained.volume / "results/hub/rlhf/actor")
    assert actor.config.hidden_size == 32
    files = [r.rpartition("/")[2] for r in trained.served if "/resolve/" in r]
    assert not [f for f in files if f.endswith((".h5", ".msgpack"))]
    assert len([r for r in trained.served if "/revision/" in r]) == 5


def test_the_reward_model_keeps_the_architecture_of_opt_350m(trained):
    path = trained.volume / "store/reward"
    scorer = AutoModelForSequenceClassification.from_pretrained(next(path.iterdir()) / "model")
    assert (scorer.config.word_embed_proj_dim, scorer.config.do_layer_norm_before) == (16, False)


def test_a_downloaded_model_records_its_commit_and_has_no_pickle(trained):
    model = trained.volume / "models/facebook/opt-1.3b@main"
    source = json.loads((model / "provenance.json").read_text())["source"]
    recorded = json.loads((trained.volume / "rlhf.lock").read_text())
    assert recorded["models/facebook/opt-1.3b@main"] == source["commit"]
    assert not list(trained.volume.rglob("*.bin.part"))
    assert not list(model.glob("*.bin"))
    assert not list((trained.volume / "work").glob("*/*/*/files"))


def test_no_prompt_is_in_two_stages_and_the_card_counts_every_row(trained):
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
        prompts[card["stage"]] = {row[0].tobytes() for row in Rows(path.parent / "train")}
    assert len(prompts) == 3
    for a, b in combinations(prompts.values(), 2):
        assert not a & b


def test_without_the_server_there_is_nothing_to_do_and_another_scenario_trains(trained):
    assert trained.jobs("results/hub/rlhf/actor", config=SCENARIO) == {}
    store = trained.volume / "store"
    before = {path: path.stat().st_mtime_ns for path in trained.volume.glob("*/*/*/provenance.json")}
    trained.snakemake("results/other/rlhf/actor", config=SCENARIO + "\noffline: true\n")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    counts = {stage: len(list((store / stage).iterdir())) for stage in ("sft", "reward", "rlhf", "data")}
    assert counts == {"sft": 2, "reward": 2, "rlhf": 2, "data": 3}
    actors = [trained.volume / f"results/{name}/rlhf/actor" for name in ("hub", "other")]
    weights = [AutoModelForCausalLM.from_pretrained(actor).state_dict() for actor in actors]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])


def test_offline_a_missing_model_is_an_error_in_one_sentence(empty):
    run = empty.snakemake("-k", "results/hub/sft/actor", config=SCENARIO + "\noffline: true\n", check=False)
    text = run.stdout + run.stderr
    assert run.returncode == 1
    assert "model facebook/opt-1.3b is not on the volume, and nothing may be downloaded" in text
    assert "Traceback" not in text


def test_models_and_datasets_on_the_volume_are_used_without_a_download(empty, hub):
    """As users of DeepSpeed-Chat have them: a clone of the repository, `save_to_disk`, JSON lines."""
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
    empty.snakemake("results/hub/sft/actor", "--until", "data", config=local + "\noffline: true\n")
    assert list(empty.volume.glob("models/local/*/model*.safetensors"))
    assert (empty.volume / "models/opt-13b/pytorch_model-00001-of-00002.bin").exists()
    (card,) = empty.volume.glob("store/data/*/card.json")
    counts = json.loads(card.read_text())["datasets"]
    assert counts["./datasets/mine"] == counts["./more.jsonl"]


KILLS = 20
CHUNK = 1 << 20
# The script as it is, but for the size of a range: a kill in a big one would prove little.
FETCH = """
import runpy, sys
from rlhf.sources import download
download.CHUNK = int(sys.argv.pop(1))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_download_that_is_killed_at_any_moment_resumes(tmp_path):
    """Killed 20 times: each process first requests the rest of the part on disk, and no kill costs more
    than one chunk; the bytes are right, and no partial file is left."""
    draw = random.Random(7)
    folder = tmp_path / "hub/datasets/a/b"
    folder.mkdir(parents=True)
    (folder / "train.data.json").write_text("{}")
    content = draw.randbytes(48 << 20)
    (folder / "train.parquet").write_bytes(content)
    volume = tmp_path / "volume"
    volume.mkdir()
    part = volume / "work/datasets/a/b@main/files/train.parquet.part"
    sizes, begun = [0], [0]  # of the part and of the server's list, at the start of each process
    with HubServer(tmp_path / "hub") as server:
        server.pause = 0.001
        for _ in range(KILLS):
            process = start_fetch(volume, server)
            until = fetched(server) + draw.randrange(3 << 20)
            while process.poll() is None and fetched(server) < until:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait(timeout=120) == -signal.SIGKILL
            time.sleep(0.05)  # the server still sends what it requested
            sizes.append(part.stat().st_size if part.exists() else 0)
            begun.append(len(server.sent))
        assert start_fetch(volume, server).wait(timeout=120) == 0
    for size, start, end in zip(sizes, begun, [*begun[1:], None], strict=True):
        firsts = [first for name, first, _ in server.sent[start:end] if name == "train.parquet"]
        assert firsts[:1] in ([], [size])
    again = [
        fetched(server, start, end) - (after - before)
        for (before, after), (start, end) in zip(pairwise(sizes), pairwise(begun), strict=True)
    ]
    print(f"fetched again per kill: {sum(again) / KILLS / 2**20:.2f} MiB, at most {max(again) / 2**20:.2f}")
    assert max(again) <= CHUNK
    assert len(set(sizes)) > KILLS / 2
    artefact = volume / "datasets/a/b@main"
    assert (artefact / "files/train.parquet").read_bytes() == content
    assert [p.name for p in artefact.parent.iterdir()] == ["b@main"]
    assert not list(volume.rglob("*.part"))


def fetched(server: HubServer, start: int = 0, end: int | None = None) -> int:
    return sum(n for name, _, n in server.sent[start:end] if name == "train.parquet")


def start_fetch(volume: Path, server: HubServer) -> subprocess.Popen:
    spec = {"stage": "dataset", "config": {"dataset": "a/b", "revision": "main"}, "parents": {}, "code": "x"}
    path = "datasets/a/b@main"
    scripts = Path(__file__).parents[2] / "scripts"
    command = [sys.executable, "-c", FETCH, str(CHUNK), str(scripts / "fetch_dataset.py")]
    command += ["--spec", json.dumps(spec), "--output", path, "--work", f"work/{path}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "HF_ENDPOINT": server.endpoint, "PYTHONPATH": str(scripts)}
    return subprocess.Popen(command, cwd=volume, env=env, **quiet)
