from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
from configurations import ROOT, own_tree

from rlhf.config import stages as sections
from rlhf.config import training
from rlhf.config.scenario import load_config
from rlhf.errors import ConfigError
from rlhf.store.plan import ENTRY, plan, refuse_misplaced, refuse_unknown

TREE = own_tree()


def code(entry):
    return f"code of {entry}"


def fingerprint(path):
    return f"mark-of-{len(path)}"


def planned(first=(), code=code, **scenarios):
    tree = TREE | {"scenarios": copy.deepcopy(scenarios)}
    return plan(load_config(tree), code, fingerprint, first)


def names(made, scenario):
    """Return what a scenario's results are links to."""
    prefix = f"results/{scenario}/"
    return {k.removeprefix(prefix): v for k, v in made.results.items() if k.startswith(prefix)}


def stages(made, scenario):
    """Return stage -> paths of what a scenario wants."""
    found = {stage: set() for stage in ENTRY}
    for path, artefact in made.artefacts.items():
        if scenario in artefact.scenarios:
            found[artefact.stage].add(path)
    return found


def changed(override, base=None):
    """Return the stages in which a scenario and its variant have different artefacts."""
    made = planned(a=base or {}, b={"base": "a", **override})
    a, b = stages(made, "a"), stages(made, "b")
    return {stage for stage in ENTRY if a[stage] != b[stage]}


def test_scenarios_that_differ_only_in_rlhf_share_all_before_it():
    made = planned(a={}, b={"rlhf": {"kl_coef": 0.7}})
    a, b = names(made, "a"), names(made, "b")
    assert {what for what in a if a[what] == b[what]} == {
        "sft/actor",
        "sft/curves.png",
        "reward/model",
        "reward/curves.png",
    }
    assert made.artefacts[a["sft/actor"].removesuffix("/model")].scenarios == ("a", "b")


@pytest.mark.parametrize(
    ("override", "stages_that_change"),
    [
        ({"eval": {"prompts": 3}}, {"eval"}),
        ({"rlhf": {"gamma": 0.9}}, {"rlhf", "eval"}),
        ({"rlhf": {"max_prompt_tokens": 9}}, {"data", "rlhf", "eval"}),
        ({"reward": {"eval_rows": 5}}, {"reward", "rlhf", "eval"}),
        ({"sft": {"steps": 5}}, {"sft", "rlhf", "eval"}),
        ({"data": {"eval_share": 0.2}}, {"data", "sft", "reward", "rlhf", "eval"}),
        ({"seed": 2}, {"model", "data", "sft", "reward", "rlhf", "eval"}),
    ],
)
def test_a_value_changes_its_own_stage_and_what_follows(override, stages_that_change):
    assert changed(override) == stages_that_change


def loaded(**scenarios):
    return load_config(TREE | {"pvc": "/volume", "scenarios": copy.deepcopy(scenarios)})


@pytest.mark.parametrize(
    ("name", "exists", "said"),
    [
        ("models/opt-13b", True, r"write ./models/opt-13b for the directory"),
        ("models/opt-13b", False, None),
        ("./models/opt-13b", True, None),
        ("./models/opt-13b", False, "a: actor.model = './models/opt-13b': no such directory below pvc"),
    ],
)
def test_a_source_that_is_not_where_its_name_says_is_refused_for_who_asks(name, exists, said):
    settings = loaded(a={"actor": {"model": name}}, b={})
    refuse_misplaced(settings, ["b"], lambda _: exists)
    if said is None:
        refuse_misplaced(settings, ["a"], lambda _: exists)
    else:
        with pytest.raises(ConfigError, match=said):
            refuse_misplaced(settings, ["a"], lambda _: exists)


def test_all_missing_paths_are_reported_at_once_with_scenarios_and_fields():
    rows = {"name": "./no.jsonl", "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}}
    lacking = {"actor": {"model": "./no"}, "sft": {"datasets": [rows]}, "rlhf": {"datasets": [rows]}}
    settings = loaded(
        a=lacking, b={"base": "a", "reward": {"model": "/else/no"}}, c={"actor": {"model": "./c"}}
    )
    with pytest.raises(ConfigError) as caught:
        refuse_misplaced(settings, ["a", "b", "nobody"], lambda _: False)
    assert str(caught.value) == (
        "4 mistakes in the configuration:\n"
        "  - a, b: actor.model = './no': no such directory below pvc (/volume): copy it there, or correct the path\n"
        "  - a, b: sft.datasets = './no.jsonl': no such file or directory below pvc (/volume): copy it there, or"
        " correct the path\n"
        "  - a, b: rlhf.datasets = './no.jsonl': no such file or directory below pvc (/volume): copy it there, or"
        " correct the path\n"
        "  - b: reward.model = '/else/no': no such directory: copy it there, or correct the path"
    )


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("a", ["results/a/sft/actor", "results/a/rlhf/eval"]),
        ("results/a/rlhf/", ["results/a/rlhf/actor", "results/a/rlhf/eval"]),
        ("results/a/rlhf/actr", ["results/a/rlhf/actor"]),
        ("/volume/results/a/rlhf/eval", ["results/a/rlhf/eval"]),
        ("/volume/results/a/sft/actor", ["results/a/sft/actor"]),
        ("some/where/sft/actor", ["results/a/rlhf/actor"]),
        ("zzz", ["results/a/rlhf/actor", "results/b/rlhf/actor"]),
    ],
)
def test_an_unknown_target_is_reported_with_those_that_may_be_meant(target, meant):
    made = planned(a={}, b={})
    refuse_unknown(made, ["./results/a//rlhf/actor/", *made.artefacts, "benchmarks/sft/x.tsv"])
    with pytest.raises(ConfigError, match=f"no scenario makes {target}; did you mean ") as caught:
        refuse_unknown(made, [target])
    assert all(f" {name} " in f"{caught.value} ".replace("?", " ") for name in meant)


def test_with_ptx_rlhf_reads_the_rows_of_sft_as_they_are():
    made = planned(a={"rlhf": {"ptx_coef": 0.5}})
    sft, rlhf = (made.artefacts[names(made, "a")[n].rsplit("/", 1)[0]] for n in ("sft/actor", "rlhf/actor"))
    assert rlhf.parents["ptx"] == sft.parents["data"]
    assert changed({"rlhf": {"ptx_coef": 0.5}}) == {"rlhf", "eval"}


def test_the_mean_of_the_actors_weights_is_a_result_where_it_is_wanted():
    made = planned(a={"rlhf": {"ema_decay": 0.99}}, b={})
    assert names(made, "a")["rlhf/actor_ema"] == names(made, "a")["rlhf/actor"] + "_ema"
    assert "rlhf/actor_ema" not in names(made, "b")


def test_adapters_are_results_where_they_alone_are_trained():
    lora = {"dim": 4, "alpha": 4.0, "learning_rate": 1e-3}
    made = planned(
        a={"sft": {"lora": lora}, "rlhf": {"critic_lora": lora, "actor_lora": lora | {"only": False}}}
    )
    assert {what for what in names(made, "a") if "adapter" in what} == {"sft/adapter", "rlhf/critic_adapter"}
    assert names(made, "a")["sft/adapter"] == names(made, "a")["sft/actor"].replace("/model", "/adapter")


def test_swapped_learning_rates_are_another_training():
    rates = {"rlhf": {"actor": {"learning_rate": 1e-4}, "critic": {"learning_rate": 3e-4}}}
    swapped = {"rlhf": {"actor": {"learning_rate": 3e-4}, "critic": {"learning_rate": 1e-4}}}
    assert changed(swapped, rates) == {"rlhf", "eval"}
    rates = {"sft": {"optimizer": {"learning_rate": 1e-4}}, "reward": {"optimizer": {"learning_rate": 3e-4}}}
    swapped = {
        "sft": {"optimizer": {"learning_rate": 3e-4}},
        "reward": {"optimizer": {"learning_rate": 1e-4}},
    }
    assert changed(swapped, rates) == {"sft", "reward", "rlhf", "eval"}


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        (stage, field)
        for stage in sections.STAGES
        for field in (training.RlhfRun if stage == "rlhf" else training.TrainingRun).model_fields
    ],
)
def test_how_a_stage_runs_is_in_no_name(stage, field):
    """Another value (the defaults have none of these); some need sharding first, or two heads."""
    values = {"offload": ["optimizer"], "gradient_checkpointing": True, "packing": True}
    run = {"zero_stage": 3, "micro_batch_size": 16, "processes": 2, field: values.get(field, 2)}
    assert changed({stage: {"run": run}}, {"actor": {"model": "builtin/opt-2x64-bpe1024"}}) == set()


def test_a_comparison_is_run_by_what_its_script_reads():
    """How the comparison is run is what a PPO training could be run as."""
    made = plan(load_config(TREE), code, fingerprint)
    for artefact in made.artefacts.values():
        if artefact.stage == "eval":
            training.RlhfRun.model_validate_json(artefact.run.model_dump_json())


def test_every_value_but_run_is_in_a_name():
    """A field that a later version adds cannot be forgotten."""
    optimizer = {
        "weight_decay": 0.5,
        "betas": [0.5, 0.6],
        "eps": 0.1,
        "max_grad_norm": 3,
        "schedule": "linear",
        "warmup_steps": 5,
        "warmup_ratio": 0.2,
        "final_ratio": 0.5,
        "learning_rate": 0.5,
    }
    training = {
        "max_tokens": 9,
        "train_batch_size": 128,
        "steps": 9,
        "epochs": 3,
        "eval_rows": 3,
        "datasets": [{"name": "builtin/chitchat-pairs", "split": "test"}],
        "dtype": "bf16",
        "optimizer": optimizer,
        "lora": {"dim": 4, "alpha": 4, "learning_rate": 1},
    }
    beside = {"epochs": {"steps": None}, "steps": {"epochs": None}, "warmup_ratio": {"warmup_steps": None}}
    for stage, section in (("sft", sections.Training), ("reward", sections.Training)):
        assert set(training) == set(section.model_fields) - {"run"}
        for field, value in training.items():
            for name, inner in value.items() if field == "optimizer" else [(None, value)]:
                change = {name or field: inner, **beside.get(name or field, {})}
                override = {field: change} if name else change
                assert stage in changed({stage: override}), (stage, field, name)


def test_every_value_of_ppo_but_run_is_in_a_name():
    optimizer, lora = {"learning_rate": 0.5}, {"dim": 4, "alpha": 4, "learning_rate": 1}
    values = {
        "datasets": [{"name": "builtin/chitchat-pairs", "split": "test"}],
        "max_prompt_tokens": 9,
        "max_new_tokens": 9,
        "iterations": 9,
        "epochs": 3,
        "rollout_batch_size": 128,
        "mini_batches": 1,
        "ppo_epochs": 2,
        "temperature": 0.5,
        "missing_eos_penalty": 0.5,
        "reward_clip": 2,
        "reward_samples": 128,
        "kl_coef": 0.9,
        "kl_target": 3,
        "kl_horizon": 999,
        "gamma": 0.5,
        "gae_lambda": 0.5,
        "clip_range": 0.5,
        "value_clip_range": 0.5,
        "shuffle_scores": True,
        "ema_decay": 0.5,
        "ptx_coef": 0.5,
        "dtype": "bf16",
        "actor": optimizer,
        "critic": optimizer,
        "actor_lora": lora,
        "critic_lora": lora,
    }
    assert set(values) == set(sections.Rlhf.model_fields) - {"run"}
    for field, value in values.items():
        beside = {"iterations": None} if field == "epochs" else {}
        assert "rlhf" in changed({"rlhf": {field: value, **beside}}), field


@pytest.mark.parametrize(
    ("section", "model", "stage", "values"),
    [
        ("data", sections.Data, "data", {"shares": {"sft": 9}, "eval_share": 0.5}),
        (
            "eval",
            sections.Eval,
            "eval",
            {"prompts": 9, "max_new_tokens": 9, "temperature": 0.5, "seed": 9, "judge": None},
        ),
    ],
)
def test_every_value_of_data_and_eval_is_in_a_name(section, model, stage, values):
    assert set(values) == set(model.model_fields)
    for field, value in values.items():
        assert stage in changed({section: {field: value}}), field


def test_other_code_of_a_stage_makes_it_and_what_follows_anew():
    before, after = planned(a={}), planned(a={}, code=lambda e: code(e) + "!" * (e == "train_reward.py"))
    a, b = stages(before, "a"), stages(after, "a")
    assert {stage for stage in ENTRY if a[stage] != b[stage]} == {"reward", "rlhf", "eval"}


@pytest.mark.parametrize("what", ["sft/adapter", "rlhf/critic_adapter", "rlhf/actor_ema"])
def test_a_result_that_needs_a_setting_is_reported_with_the_setting(what):
    with pytest.raises(
        ConfigError, match=r"adapters need `lora` with `only`, actor_ema needs .*results/a/sft/actor"
    ):
        refuse_unknown(planned(a={}), [f"results/a/{what}"])


def test_the_first_scenario_decides_how_what_is_shared_is_run():
    scenarios = {"a": {}, "b": {"sft": {"run": {"threads": 7}}}, "c": {}}
    for first, threads, others in (([], 1, ("b",)), (["b"], 7, ("a", "c")), (["c"], 1, ("b",))):
        made = planned(first, **scenarios)
        sft = made.artefact_of("results/a/sft/actor")
        assert (sft.run.threads, sft.run_differs) == (threads, others)
        assert sft.scenarios[0] == (first or ["a"])[0]


def test_nothing_is_reported_about_equal_runs():
    made = planned(a={}, b={"rlhf": {"kl_coef": 0.7}})
    assert all(artefact.run_differs == () for artefact in made.artefacts.values())


def test_a_first_scenario_that_does_not_exist_is_passed_over():
    assert planned(["nobody"], a={}, b={}) == planned(a={}, b={})


def test_first_changes_no_name():
    scenarios = {"a": {}, "b": {"seed": 4}}
    one, two = planned(["a"], **scenarios), planned(["b"], **scenarios)
    assert one.results == two.results
    assert set(one.artefacts) == set(two.artefacts)


def test_parents_come_before_their_children_and_are_in_the_plan():
    made = planned(a={}, b={"seed": 2})
    earlier = set()
    for path, artefact in made.artefacts.items():
        assert set(artefact.parents.values()) <= earlier
        earlier.add(path)


def test_every_result_is_in_an_artefact():
    made = planned(a={})
    for result, place in made.results.items():
        assert place.startswith(made.artefact_of(result).path)


def test_a_spec_is_plain_json():
    for artefact in planned(a={}).artefacts.values():
        assert json.loads(json.dumps(artefact.spec)) == artefact.spec


def test_one_number_written_in_several_ways_is_one_name():
    spellings = [1, 1.0, "1", "1e0"]
    assert len({planned(a={"rlhf": {"gamma": s}}).results["results/a/rlhf/actor"] for s in spellings}) == 1


def test_the_order_of_lines_in_the_file_is_in_no_name():
    def turned(tree):
        return {k: turned(v) for k, v in reversed(tree.items())} if isinstance(tree, dict) else tree

    tree = copy.deepcopy(TREE)
    one, two = (plan(load_config(t), code, fingerprint) for t in (tree, turned(tree)))
    assert one.results == two.results


def test_a_scenarios_own_name_is_in_no_name():
    made = planned(a={}, b={})
    assert names(made, "a") == names(made, "b")


def test_names_are_the_same_in_every_process():
    program = (
        "import sys, yaml, json; from rlhf.config.scenario import load_config; from rlhf.store import plan;"
        "tree = yaml.safe_load(open('config.yaml'));"
        "print(json.dumps(plan.plan(load_config(tree), lambda e: 'code of ' + e, lambda p: '').results))"
    )
    here = plan(load_config(TREE), code, fingerprint).results
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "scripts")}
        there = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        assert json.loads(there.stdout) == here
