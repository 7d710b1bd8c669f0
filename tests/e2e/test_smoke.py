"""The whole pipeline at tiny scale: what it makes, and what it rebuilds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import heed_ctrl_c, wait_for
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ACTOR = "results/smoke/rlhf/actor"
NAMES = {"link": 1}  # of an actor; what it was built from is named without a job
FASTER = "scenarios: {smoke: {reward: {optimizer: {learning_rate: 6.0e-4}}}}"


def test_after_a_run_there_is_nothing_to_do(smoke):
    assert smoke.jobs(ACTOR) == {}


def test_states_of_finished_trainings_are_removed_and_every_artefact_is_whole(smoke):
    artefacts = [smoke.artefact(f"smoke/{name}") for name in ("sft/actor", "reward/model", "rlhf/actor")]
    assert not [p for p in artefacts if (smoke.volume / "work" / p.parent.name / p.name).exists()]
    command = [sys.executable, str(smoke.project / "scripts/store.py"), "--pvc", str(smoke.volume), "verify"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "intact: " in run.stdout


def test_the_actor_is_a_plain_model_whose_responses_end_with_eos(smoke):
    path = smoke.volume / ACTOR
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "hello, how are you?"}]
    inputs = tokenizer.apply_chat_template(
        [chat] * 32, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(1)
    out = model.generate(**inputs, max_new_tokens=60)[:, inputs["input_ids"].shape[1] :]
    ended = [row for row in out.tolist() if tokenizer.eos_token_id in row]
    assert len(ended) > 16
    assert all(set(row[row.index(tokenizer.eos_token_id) + 1 :]) <= {tokenizer.pad_token_id} for row in ended)


def test_transformers_gives_the_scores_that_ppo_used(smoke):
    from rlhf.data.tokens import Padded
    from rlhf.models.loading import load_scorer
    from rlhf.models.outputs import scores

    path = smoke.volume / "results/smoke/reward/model"
    theirs, ours = AutoModelForSequenceClassification.from_pretrained(path), load_scorer(path, torch.float32)
    ids = torch.randint(6, 1024, (8, 20), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 12:] = False
    ids[~mask] = theirs.config.pad_token_id
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(scores(ours, Padded(ids, mask)), expected)


def test_logs_have_a_progress_line_every_ten_seconds_and_at_the_end(smoke):
    for result, name, total in (
        ("sft/actor", "SFT", "250/250"),
        ("reward/model", "reward model", "80/80"),
        ("rlhf/actor", "PPO", "24/24"),
    ):
        artefact = smoke.artefact(f"smoke/{result}")
        text = (smoke.volume / f"logs/{artefact.parent.name}/{artefact.name}.log").read_text()
        bars = [line for line in text.splitlines() if line.startswith(f"{name}:")]
        assert f"{name}: 100%" in bars[-1]
        assert total in bars[-1]
        assert len(bars) < int(total.split("/")[0]) / 2
        assert "\r" not in text
    (log,) = (smoke.volume / "logs/datasets/builtin").glob("chitchat@*.log")
    assert re.search(r"^builtin/chitchat: \d+.*rows", log.read_text(), re.M)


def test_chat_prints_the_same_response_for_the_same_seed(smoke):
    command = [
        sys.executable,
        str(smoke.project / "scripts/chat.py"),
        str(smoke.volume / ACTOR),
        "--prompt",
        "hello",
        "--seed",
        "1",
        "--temperature",
        "0.5",
    ]
    printed = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(printed) == 1
    assert printed.pop().strip()


def test_a_conversation_remembers_its_turns_and_ends_with_the_input(smoke):
    import chat

    from rlhf.data.templates import load_tokenizer
    from rlhf.generation.sampler import Sampler
    from rlhf.generation.sampling import Sampling
    from rlhf.models.loading import load_actor
    from rlhf.terminal import printable

    path, lines = smoke.volume / ACTOR, ["hello", "what do you think of dogs?"]
    command = [
        sys.executable,
        str(smoke.project / "scripts/chat.py"),
        str(path),
        "--seed",
        "1",
        "--temperature",
        "1",
    ]
    run = subprocess.run(command, input="\n\n".join(lines), capture_output=True, text=True, check=True)
    tokenizer = load_tokenizer(path)
    sampling = Sampling(64, 1.0, tokenizer.eos_token_id, tokenizer.pad_token_id)
    sampler = Sampler(load_actor(path, torch.float32).eval(), sampling)
    sampler.refresh()
    first = chat.respond(sampler, tokenizer, lines[:1], 1)
    second = chat.respond(sampler, tokenizer, [lines[0], first, lines[1]], 3)
    assert run.stdout == printable(f"{first}\n{second}\n")
    assert second != chat.respond(sampler, tokenizer, lines[1:], 3)


@pytest.mark.parametrize("name", ["sft/actor", "reward/model", "rlhf/actor", "rlhf/critic"])
def test_the_example_on_a_model_card_runs(smoke, name):
    path = smoke.volume / "results/smoke" / name
    code = (path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    run = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_tensorboard_shows_the_metrics_of_every_stage(smoke):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage, result in (("sft", "actor"), ("reward", "model"), ("rlhf", "actor")):
        artefact = smoke.artefact(f"smoke/{stage}/{result}")
        board = EventAccumulator(str(smoke.volume / "logs/tensorboard" / stage / artefact.name)).Reload()
        lines = [json.loads(line) for line in (artefact / "metrics.jsonl").read_text().splitlines()]
        names = {name for line in lines for name in line if name != "step"}
        speeds = {"seconds", "samples_per_second", "tokens_per_second"}
        assert set(board.Tags()["scalars"]) == names | speeds
        run = json.loads((artefact / "run.json").read_text())
        assert run["speed"].keys() >= speeds
        assert run["decided"]["micro_batch_size"] == run["run"]["micro_batch_size"]
        for name in names:
            drawn = {event.step: event.value for event in board.Scalars(name)}
            assert drawn == pytest.approx(
                {line["step"]: line[name] for line in lines if name in line}, rel=1e-5
            )


def test_every_metric_of_ppo_is_recorded_and_no_other(smoke):
    from rlhf.training.metric_names import PPO_METRICS

    lines = (smoke.artefact("smoke/rlhf/actor") / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 24
    for line in map(json.loads, lines):
        assert line.keys() - {"step"} == PPO_METRICS.keys() - {"ptx_loss"}


def test_the_demo_shows_responses_and_says_where_picture_figures_and_chat_are(smoke, tmp_path):
    project = copied(smoke.project, tmp_path)
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("pvc: .", f"pvc: {smoke.volume}"))
    (project / "venv").mkdir()
    (project / "venv/.installed").touch()
    options = ["--no-print-directory", "TARGET=results/smoke/rlhf", "VENV=venv"]  # `make test` is above it
    make = ["make", "demo", *options, f"BIN={Path(sys.executable).parent}"]
    run = subprocess.run(make, cwd=project, capture_output=True, text=True, check=True)
    table = (smoke.volume / "results/smoke/rlhf/eval/table.txt").read_text()
    responses, count, _ = table.partition("\n256 held-out prompts ")
    assert count
    assert responses in run.stdout
    *_, picture, figures, chat = (line.partition(":") for line in run.stdout.splitlines())
    assert [name for name, _, _ in (picture, figures, chat)] == ["picture", "figures", "chat"]
    assert Path(picture[2].strip()).read_bytes().startswith(b"\x89PNG")
    assert Path(figures[2].strip()).read_text() == table
    command = [*chat[2].split(), "--prompt", "hello"]
    assert subprocess.run(command, cwd=project, capture_output=True, check=True).stdout.strip()


def test_chat_with_a_reward_model_is_an_error_in_one_sentence(smoke):
    model = smoke.volume / "results/smoke/reward/model"
    command = [sys.executable, str(smoke.project / "scripts/chat.py"), str(model), "--prompt", "hello"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "gives scores, not responses" in run.stderr
    assert "Traceback" not in run.stderr


def test_built_in_pairs_that_are_left_out_are_counted(smoke):
    dataset = next(smoke.volume.glob("datasets/builtin/chitchat-pairs*"))
    counts = json.loads((dataset / "card.json").read_text())
    with (dataset / "files/train.jsonl").open() as rows:
        assert counts.pop("rows") == sum(1 for _ in rows)
    assert len(counts) == 3
    assert all(text.startswith("left out: ") and number > 0 for text, number in counts.items())


def test_a_changed_reward_learning_rate_rebuilds_reward_and_rlhf_and_keeps_the_old(smoke):
    before = {name: smoke.artefact(f"smoke/{name}") for name in ("sft/actor", "reward/model", "rlhf/actor")}
    targets = ("results/smoke/reward/model", ACTOR)
    assert smoke.jobs(*targets, config=FASTER) == {"reward": 1, "rlhf": 1, "link": 2}
    smoke.snakemake(*targets, config=FASTER)
    after = {name: smoke.artefact(f"smoke/{name}") for name in before}
    assert after["sft/actor"] == before["sft/actor"]
    assert after["rlhf/actor"] != before["rlhf/actor"]
    assert all(path.exists() for path in before.values())
    assert smoke.jobs(*targets) == {"link": 2}
    smoke.snakemake(*targets)
    assert {name: smoke.artefact(f"smoke/{name}") for name in before} == before


def test_an_actor_comes_with_the_names_of_what_it_was_built_from(smoke):
    """Also where nothing has to be built; a name that leads elsewhere is corrected."""
    names = [f"smoke/{name}" for name in ("sft/actor", "reward/model", "rlhf/critic", "sft/curves.png")]
    before = [smoke.artefact(name) for name in names]
    results = smoke.volume / "results"
    shutil.rmtree(results / "smoke/sft")
    (results / "smoke/reward/model").unlink()
    (results / "smoke/reward/model").symlink_to("../../../store")
    for query in ("-n", "--summary", "--unlock"):
        smoke.snakemake(query, ACTOR)
    assert not (results / "smoke/sft").exists()
    other = results / "other/reward/model"
    other.parent.mkdir(parents=True)
    other.symlink_to("../../../store")
    smoke.snakemake(ACTOR, config="scenarios: {other: {base: smoke}}")
    assert [smoke.artefact(name) for name in names] == before
    assert other.readlink() == Path("../../../store")  # nobody asked for this scenario
    shutil.rmtree(results / "other")


def test_a_second_scenario_that_differs_in_ppo_runs_ppo_only(smoke):
    config = "scenarios: {other: {base: smoke, rlhf: {kl_coef: 0.5}}}"
    assert smoke.jobs("results/other/rlhf/actor", config=config) == {"rlhf": 1, **NAMES}


def test_swapped_learning_rates_of_actor_and_critic_rebuild_rlhf(smoke):
    swapped = "{actor: {learning_rate: 3.0e-4}, critic: {learning_rate: 1.4e-4}}"
    assert smoke.jobs(ACTOR, config=f"scenarios: {{smoke: {{rlhf: {swapped}}}}}") == {"rlhf": 1, **NAMES}


def test_a_removed_rlhf_artefact_is_rebuilt_alone(smoke, tmp_path):
    artefact = smoke.artefact("smoke/rlhf/actor")
    shutil.move(artefact, tmp_path / "kept")
    try:
        assert smoke.jobs(ACTOR) == {"rlhf": 1, **NAMES}
    finally:
        shutil.move(tmp_path / "kept", artefact)


def test_an_edit_of_code_rebuilds_the_stages_that_use_it_and_a_comment_none(smoke, tmp_path):
    project = copied(smoke.project, tmp_path)
    copy = type(smoke)(smoke.volume, project)
    reward = project / "scripts/rlhf/training/reward.py"
    text = reward.read_text()
    reward.write_text(text.replace('"""The reward stage:', '"""The second stage:') + "\n# a remark\n")
    assert copy.jobs(ACTOR) == {}
    reward.write_text(text.replace("chosen - rejected).sum()", "1.0 * (chosen - rejected)).sum()"))
    assert copy.jobs(ACTOR) == {"reward": 1, "rlhf": 1, "link": 1}
    adopt = [sys.executable, str(project / "scripts/store.py"), "--pvc", str(smoke.volume), "adopt", ACTOR]
    run = subprocess.run(adopt, capture_output=True, text=True, check=True)
    assert "adopted from" in run.stdout
    assert copy.jobs(ACTOR) == {"link": 1}


def test_the_store_lists_artefacts_and_says_why_one_is_rebuilt(smoke):
    store = [sys.executable, str(smoke.project / "scripts/store.py"), "--pvc", str(smoke.volume)]
    listing = subprocess.run([*store, "ls"], capture_output=True, text=True, check=True).stdout
    assert f"<- {ACTOR}" in listing
    overrides = smoke.volume / "other.yaml"
    tree = (smoke.project / "config.yaml").read_text()
    overrides.write_text(tree.replace("iterations: 24", "iterations: 25"))
    why = [*store[:2], "--configfile", str(overrides), *store[2:], "why", ACTOR]
    text = subprocess.run(why, capture_output=True, text=True, check=True).stdout
    assert "is missing" in text
    assert text.splitlines()[2:] == ["  rlhf.iterations: 25, there 24"]


def test_verify_names_every_damage_with_code_2(smoke):
    command = [sys.executable, str(smoke.project / "scripts/store.py"), "--pvc", str(smoke.volume), "verify"]
    half, damaged = (
        smoke.volume / "store/sft/half-000000000000",
        smoke.volume / "store/sft/damaged-000000000000",
    )
    half.mkdir()
    shutil.copytree(smoke.artefact("smoke/sft/actor"), damaged)
    (damaged / "provenance.json").write_text("")
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(half)
    shutil.rmtree(damaged)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert f"{half.name} has no provenance.json" in run.stderr
    assert f"{damaged.name}/provenance.json is damaged" in run.stderr


def test_gc_lists_what_no_result_needs_and_removes_it_with_yes_only(smoke):
    store = [sys.executable, str(smoke.project / "scripts/store.py"), "--pvc", str(smoke.volume), "gc"]
    orphan = smoke.volume / "store/sft/orphan-000000000000"
    shutil.copytree(smoke.artefact("smoke/sft/actor"), orphan)
    shown = subprocess.run(store, capture_output=True, text=True, check=True, input="").stdout
    assert "orphan-000000000000" in shown
    assert orphan.exists()
    subprocess.run([*store, "--yes"], capture_output=True, text=True, check=True)
    assert not orphan.exists()
    assert smoke.artefact("smoke/rlhf/actor").exists()


def test_a_training_that_fails_halfway_keeps_the_old_result_and_its_state(smoke):
    config = "scenarios: {smoke: {rlhf: {kl_coef: 0.4}}}"
    old = smoke.artefact("smoke/rlhf/actor")
    process = smoke.start(ACTOR, config=config)
    lock = wait_for(
        lambda: [p for p in smoke.volume.glob("work/rlhf/*/lock") if list(p.parent.glob("step-*"))]
    )
    os.kill(int(lock[0].read_text().split()[1]), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    assert smoke.artefact("smoke/rlhf/actor") == old
    assert AutoModelForCausalLM.from_pretrained(smoke.volume / ACTOR).num_parameters() > 0
    assert list(smoke.volume.glob("work/rlhf/*/step-*"))
    smoke.snakemake(ACTOR, config=config)
    new = smoke.artefact("smoke/rlhf/actor")
    assert new != old
    assert "resumed after step" in (smoke.volume / f"logs/rlhf/{new.name}.log").read_text()
    smoke.snakemake(ACTOR)
    assert smoke.artefact("smoke/rlhf/actor") == old


def test_ctrl_c_ends_with_a_line_that_says_how_to_resume(smoke):
    config = "scenarios: {stopped: {base: smoke, sft: {eval_rows: 2047, run: {save_steps: 20}}}}"
    command = smoke.command("results/stopped/sft/actor", config=config)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    before = set(smoke.volume.glob("work/sft/*/step-*[0-9]"))
    process = subprocess.Popen(
        command, cwd=smoke.project, start_new_session=True, preexec_fn=heed_ctrl_c, **quiet
    )
    wait_for(lambda: set(smoke.volume.glob("work/sft/*/step-*[0-9]")) - before)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert (process.returncode, "Traceback" in errors) == (1, False)
    assert errors.rindex("stopped: the same command resumes from the last saved state") > errors.rindex(
        "Error in rule"
    )


def test_a_training_that_diverges_ends_with_one_sentence_below_everything_else(smoke):
    config = "scenarios: {wild: {base: smoke, sft: {steps: 20, optimizer: {learning_rate: 1.0e+9}}}}"
    run = smoke.snakemake("results/wild/sft/actor", config=config, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (1, False)
    what, why, log = run.stderr[run.stderr.rindex("failed: ") :].splitlines()[:3]
    assert what.startswith("failed: Supervised fine-tuning of builtin/opt-2x64-bpe1024 for wild")
    assert re.fullmatch(
        r"  error: the (loss|gradient's norm) is (nan|inf) at step \d+: .*learning rate.*", why
    )
    assert why.strip() in (smoke.volume / log.removeprefix("  log: ")).read_text()
    assert "Error in rule" not in run.stderr[run.stderr.rindex(log) :]


def test_an_artefact_published_after_snakemake_was_killed_is_used_as_it_is(smoke):
    config = "scenarios: {short: {base: smoke, sft: {steps: 60}}}"
    targets, store = ("results/short/sft/actor", "results/short/sft/curves.png"), smoke.volume / "store/sft"
    before, locks = set(store.iterdir()), set(smoke.volume.glob("work/sft/*/lock"))
    process = smoke.start(*targets, config=config)
    (lock,) = wait_for(lambda: set(smoke.volume.glob("work/sft/*/lock")) - locks)
    process.kill()  # its job continues
    process.wait()
    (artefact,) = wait_for(lambda: [p for p in set(store.iterdir()) - before if not p.name.startswith(".")])
    assert lock.parent.name == artefact.name
    published = (artefact / "run.json").stat()
    smoke.snakemake("--unlock", config=config)
    smoke.snakemake(*targets, config=config)
    assert smoke.artefact("short/sft/actor") == artefact
    assert (smoke.volume / targets[1]).is_file()
    assert (artefact / "run.json").stat() == published


def copied(project, where):
    """Return a copy of the project's files, without artefacts and environments at its top."""
    left_out = {".venv", ".git", ".snakemake", "store", "models", "datasets", "work", "results"}
    return shutil.copytree(
        project, where / "project", ignore=lambda folder, _: left_out if Path(folder) == project else set()
    )
