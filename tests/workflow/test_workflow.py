"""The Snakefile without running a job."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

ACTOR = "results/smoke/rlhf/actor"
LINKS = {"link": 1}  # an actor; what it was built from is named without a job


def test_the_plan_from_an_empty_volume_makes_each_artefact_once(empty):
    expected = {"model": 1, "dataset": 2, "data": 3, "sft": 1, "reward": 1, "rlhf": 1, **LINKS}
    assert empty.jobs(ACTOR) == expected


def test_scenarios_that_differ_in_ppo_share_all_else(empty):
    other = "scenarios: {other: {base: smoke, rlhf: {kl_coef: 0.4}}}"
    jobs = empty.jobs(ACTOR, "results/other/rlhf/actor", config=other)
    assert jobs["sft"] == jobs["reward"] == 1
    assert jobs["rlhf"] == 2
    assert {rule: 2 * count for rule, count in LINKS.items()}.items() <= jobs.items()


def test_a_job_says_in_words_what_it_makes_and_for_whom(empty):
    text = empty.snakemake("-n", ACTOR).stdout
    assert "Supervised fine-tuning of builtin/opt-2x64-bpe1024 for smoke" in text
    assert (
        "PPO of builtin/opt-2x64-bpe1024 with the reward model from builtin/opt-2x64-bpe1024 for smoke"
        in text
    )


def plan_of(text):
    """Return the numbered lines that a dry run ends with."""
    headline, *lines = text[text.rindex("\n\n") :].strip().split("\n")
    assert re.fullmatch(r"\d+ jobs? would run, in this order:", headline)
    assert int(headline.split()[0]) == len(lines)
    numbers, titles = zip(*(line.strip().split(". ", 1) for line in lines), strict=True)
    assert [*map(int, numbers)] == [*range(1, len(lines) + 1)]
    return titles


def test_a_dry_run_ends_with_one_line_for_each_job_in_order_and_none_for_links(empty):
    titles = plan_of(empty.snakemake("-n", ACTOR).stdout)
    kinds = [
        re.match(r"Dataset|Pretrained model|Tokenised rows|Supervised|Reward model|PPO", title)[0]
        for title in titles
    ]
    assert sorted(kinds[:3]) == ["Dataset", "Dataset", "Pretrained model"]
    assert kinds[3:6] == ["Tokenised rows"] * 3
    assert sorted(kinds[6:8]) == ["Reward model", "Supervised"]
    assert kinds[8:] == ["PPO"]


def test_the_lines_of_a_dry_run_are_the_same_every_time(empty):
    one, two = (plan_of(empty.snakemake("-n", ACTOR).stdout) for _ in range(2))
    assert one == two


def test_the_lines_of_a_dry_run_follow_what_is_there(empty):
    table = empty.snakemake(ACTOR, "--summary").stdout
    for name in re.findall(r"^((?:models|datasets|store|results)/\S+)\t", table, re.M):
        path = empty.volume / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        (path if path.suffix else path / "provenance.json").write_text("{}")
    assert empty.snakemake("-n", ACTOR).stdout.endswith("Nothing would run: everything exists.\n")


@pytest.mark.parametrize(
    "options",
    [
        ("--dag", "dot"),
        ("-n", "--dag", "dot"),
        ("--rulegraph", "dot"),
        ("-n", "--summary"),
        ("-n", "--quiet"),
    ],
    ids=" ".join,
)
def test_what_another_program_reads_has_no_lines_of_ours(empty, options):
    text = empty.snakemake(ACTOR, *options).stdout
    assert "would run" not in text
    assert "Supervised fine-tuning" not in text


def test_the_requested_scenario_decides_how_a_shared_artefact_is_run(empty):
    other = "scenarios: {other: {base: smoke, sft: {run: {threads: 2}}}}"
    text = empty.snakemake("-n", "results/other/sft/actor", config=other).stdout
    assert "for other, smoke (run as other says; smoke would run it otherwise)" in text


def test_sft_and_the_reward_model_do_not_wait_for_each_other(empty):
    lines = empty.snakemake("--dag", "dot", ACTOR).stdout.splitlines()
    nodes = {n.split("[")[0].strip(): n for n in lines if "label" in n}
    edges = {tuple(e.strip().split(" -> ")) for e in lines if "->" in e}

    def node(word):
        return next(key for key, text in nodes.items() if f'"{word}' in text)

    assert (node("sft"), node("rlhf")) in edges
    assert (node("reward"), node("rlhf")) in edges
    assert (node("sft"), node("reward")) not in edges


def test_config_mistakes_end_with_code_2_and_no_traceback(empty):
    run = empty.snakemake(
        "-n", ACTOR, config="scenarios: {smoke: {seed: -3, sft: {lerning: 1}}}", check=False
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "smoke: seed = -3 (from scenarios.smoke)" in run.stderr
    assert "smoke: sft.lerning = 1 (from scenarios.smoke): no such field" in run.stderr


def test_an_unknown_scenario_is_refused(empty):
    run = empty.snakemake("-n", "results/nosuch/rlhf/actor", check=False)
    assert run.returncode == 2
    assert "no scenario makes results/nosuch/rlhf/actor; did you mean results/" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("target", ["store/sft/foo", "smoke", "/data/results/smoke/rlhf/actor"])
def test_a_target_that_no_scenario_makes_is_refused(empty, target):
    run = empty.snakemake("-n", target, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert f"no scenario makes {target}; did you mean " in run.stderr
    assert "results/smoke/rlhf/actor" in run.stderr.split("did you mean")[1]


def test_targets_are_those_of_snakemake_and_not_values_of_options(empty):
    value = ("--configfile", "results/no/target")  # a later --configfile takes its place
    assert empty.jobs(f"./{ACTOR}", "all", *value)["rlhf"] == 2


@pytest.mark.parametrize(("value", "code"), [("true", 0), ("False", 0), ("maybe", 2), ("1", 2)])
def test_offline_can_be_said_on_the_command_line(empty, value, code):
    run = empty.snakemake("-n", ACTOR, "--config", f"offline={value}", check=False)
    assert run.returncode == code
    assert ("should be true or false" in run.stderr) == (code == 2)


@pytest.mark.parametrize("pvc", ["~/x", "/proc/none/x", "/etc/passwd", "not/there"])
def test_a_volume_that_cannot_be_written_to_is_refused(empty, pvc):
    run = empty.snakemake("-n", ACTOR, "--config", f"pvc={pvc}", check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert f"pvc = '{pvc}'" in run.stderr


def test_a_scenario_that_is_written_twice_is_refused(empty):
    run = empty.snakemake("-n", ACTOR, config="scenarios: {a: {}, b: {}, a: {base: b}}\n", check=False)
    assert run.returncode == 2
    assert "line 2: a is twice in one mapping" in run.stderr


def test_a_config_yaml_that_is_no_yaml_is_reported_by_its_line(empty, tmp_path):
    copied = tmp_path / "project"
    for name in ("rules", "scripts"):
        shutil.copytree(empty.project / name, copied / name)
    shutil.copy(empty.project / "Snakefile", copied)
    (copied / "config.yaml").write_text("scenarios:\n  a: {seed: 1\n  b: {}\n")
    run = type(empty)(empty.volume, copied).snakemake("-n", ACTOR, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert "error: config.yaml, line 3: " in run.stderr


def test_what_is_on_another_pvc_is_made_there_under_the_same_name(empty, tmp_path_factory):
    """A model that is there is not made again; on the other volume it is."""
    elsewhere, model = type(empty)(tmp_path_factory.mktemp("elsewhere")), "models/builtin/opt-2x64-bpe1024"
    names = [line for line in empty.snakemake("-n", ACTOR).stdout.split() if line.startswith(model)]
    there = empty.volume / names[0].rstrip(",")
    there.mkdir(parents=True)
    (there / "provenance.json").write_text("{}")
    assert "model" not in empty.jobs(ACTOR)
    assert elsewhere.jobs(ACTOR)["model"] == 1
    shutil.copytree(empty.volume / "models", elsewhere.volume / "models")
    assert "model" not in elsewhere.jobs(ACTOR)


def test_a_directory_in_an_artefacts_place_that_is_none_is_refused(empty):
    """Snakemake takes whatever exists: what was half copied would be trained on."""
    text = empty.snakemake("-n", ACTOR).stdout
    half = re.search(r"store/sft/[\w-]+", text)[0]
    (empty.volume / half / "model").mkdir(parents=True)
    run = empty.snakemake("-n", ACTOR, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert f"no provenance.json in {empty.volume / half}: an incomplete artefact" in run.stderr
    assert empty.jobs("results/tiny/sft/actor")["sft"] == 1  # which has no use for it


@pytest.mark.parametrize("script", ["launch.py", "store.py", "chat.py", "train_ppo.py"])
def test_entry_points_explain_themselves(empty, script):
    command = [sys.executable, str(empty.project / "scripts" / script), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage" in run.stdout


def test_every_rule_has_a_log_and_all_but_links_a_benchmark(empty):
    run = empty.snakemake("--lint", check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    texts = [path.read_text() for path in (empty.project / "rules").glob("*.smk")]
    rules = [rule for text in texts for rule in re.split(r"^ *rule\b", text, flags=re.M)[1:]]
    assert len(rules) == 6
    for rule in rules:
        assert re.search(r"^ +log:$", rule, re.M), rule
        is_link = rule.lstrip().startswith("link")
        assert bool(re.search(r"^ +benchmark:$", rule, re.M)) != is_link, rule


MACHINES = {
    "single-gpu": "one node with one GPU",
    "single-node": "one node with 4 GPUs",
    "multi-node": "2 nodes with 8 GPUs each",
}


@pytest.mark.parametrize("scenario", ["single-gpu", "single-node", "multi-node"])
def test_deepspeed_chats_scenarios_are_planned_from_an_empty_volume_without_a_network(
    empty, scenario, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    text = empty.snakemake("-n", f"results/{scenario}/rlhf/actor").stdout
    assert "Pretrained model: facebook/opt-350m at main, from the Hub for" in text
    assert re.search(rf"PPO of facebook/opt-.* for .*{scenario}, on {MACHINES[scenario]}\n", text)


def test_a_users_scenario_is_another_model_in_yaml(empty):
    mine = """
scenarios:
  my-run: {base: single-gpu, actor: {model: EleutherAI/pythia-1b}, reward: {model: EleutherAI/pythia-160m}}
"""
    text = empty.snakemake("-n", "results/my-run/rlhf/actor", config=mine).stdout
    assert "PPO of EleutherAI/pythia-1b with the reward model from EleutherAI/pythia-160m for my-run" in text


def test_more_gpus_than_this_machine_has_are_refused_before_anything_starts(empty):
    wanted = "scenarios: {smoke: {sft: {run: {gpus: 999, processes: 999, micro_batch_size: 1}, train_batch_size: 999}}}"
    run = empty.snakemake("results/smoke/sft/actor", config=wanted, check=False)
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert "needs gpus = 999, this machine has" in run.stderr
    assert not (empty.volume / "models").exists()
