"""Which values a configuration may hold; how mistakes are reported is in `test_scenario.py`."""

from __future__ import annotations

import re

import pytest
from configurations import mistakes, own_tree, the_mistake, written

from rlhf.config import catalog
from rlhf.config.scenario import load_config
from rlhf.errors import ConfigError


@pytest.mark.parametrize("value", [["my"], "my", {}, None])
def test_scenarios_are_a_mapping_of_at_least_one(value):
    assert mistakes(written() | {"scenarios": value}) == [
        f"scenarios = {value!r}: should be a mapping with at least one scenario, as `my-run: {{base: tiny}}`"
    ]


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_no_number(value):
    assert the_mistake(a={"seed": value}) == (
        f"a: seed = {value} (from scenarios.a): should be a number, not true or false (seed of everything random)"
    )
    assert f"kl_coef = {value} (from scenarios.a): should be a number, not true or false" in the_mistake(
        a={"rlhf": {"kl_coef": value}}
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value):
    assert "rlhf.kl_coef" in the_mistake(a={"rlhf": {"kl_coef": value}})


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (None, None)])
def test_a_training_has_either_epochs_or_steps(epochs, steps):
    assert the_mistake(a={"sft": {"epochs": epochs, "steps": steps}}) == (
        f"a: sft.epochs = {epochs}, sft.steps = {steps} (from scenarios.a): give either epochs or steps"
        " (the other one: null)"
    )


@pytest.mark.parametrize(("epochs", "iterations"), [(1, 1), (None, None)])
def test_rlhf_has_either_epochs_or_iterations(epochs, iterations):
    assert the_mistake(a={"rlhf": {"epochs": epochs, "iterations": iterations}}) == (
        f"a: rlhf.epochs = {epochs}, rlhf.iterations = {iterations} (from scenarios.a): give either epochs or"
        " iterations (the other one: null)"
    )


def test_batches_that_do_not_divide_are_reported_together_with_sizes_that_do():
    lines = mistakes(
        written(
            a={
                "sft": {"train_batch_size": 65, "run": {"micro_batch_size": 64}},
                "reward": {"train_batch_size": 10, "run": {"micro_batch_size": 16}},
            }
        )
    )
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "sft.train_batch_size = 65",
        "reward.train_batch_size = 10",
    ]
    assert [line.split("choose ")[1] for line in lines] == ["64 or 128", "16"]


def test_a_rollout_that_does_not_divide_into_mini_batches_is_reported():
    said = the_mistake(
        a={"rlhf": {"rollout_batch_size": 64, "mini_batches": 3, "run": {"micro_batch_size": 4}}}
    )
    assert said.startswith("a: rlhf.rollout_batch_size = 64, rlhf.mini_batches = 3,")
    assert said.endswith("choose 60 or 72")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt-3x96", "should be organisation/name on the Hub, or a path on the volume"),
        ("builtin/gpt", "no such built-in model; there are builtin/opt-{layers}x{hidden}-bpe{vocabulary}"),
        ("builtin/opt-3x95-bpe1024", "needs at least one layer and a hidden size that is a multiple of 32"),
        ("builtin/opt-0x96-bpe1024", "needs at least one layer and a hidden size that is a multiple of 32"),
        ("builtin/opt-3x96-bpe10", "needs a vocabulary of at least 300"),
    ],
)
def test_an_unknown_model_is_reported_with_what_there_is(name, why):
    assert the_mistake(a={"actor": {"model": name}}).startswith(
        f"a: actor.model = '{name}' (from scenarios.a): {why}"
    )


@pytest.mark.parametrize(
    "name", ["facebook/opt-1.3b.git", "a/b--c", "a-/b", "a/b.", "a/b..c", "a/" + "b" * 97]
)
def test_a_name_that_the_hubs_client_refuses_is_refused_by_the_plan(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert catalog.unknown_model(name)
    assert catalog.unknown_model("_a/B.c-d_e") is None


def test_a_known_dataset_on_the_volume_needs_no_columns():
    known = catalog.COLUMNS["Dahoas/rm-static"]
    assert catalog.known_columns("./datasets/Dahoas/rm-static/") == known
    assert catalog.known_columns("/data/Dahoas/rm-static") == known
    assert catalog.known_columns("./rm-static") is catalog.known_columns("other/rm-static") is None


@pytest.mark.parametrize(
    ("rlhf", "run"),
    [
        ({"reward_samples": 250}, {"processes": 4, "micro_batch_size": 8}),
        ({"rollout_batch_size": 48}, {"processes": 6, "micro_batch_size": 4}),
    ],
)
def test_samples_that_do_not_divide_over_processes_are_reported(rlhf, run):
    said = the_mistake(a={"rlhf": {**rlhf, "run": run}})
    assert "choose " in said
    assert "rlhf.reward_samples = " in said


def test_two_built_in_tokenizers_are_reported_before_anything_trains():
    assert "different tokenizers: give both the same bpe" in the_mistake(
        a={"reward": {"model": "builtin/opt-2x64-bpe512"}}
    )


def test_an_unknown_dataset_is_reported_with_what_there_is():
    assert the_mistake(a={"sft": {"datasets": ["builtin/chitchat", "builtin/chat"]}}).endswith(
        "builtin/chat: no such built-in dataset; there are builtin/chitchat, builtin/chitchat-pairs"
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a/b", "the columns of a/b are not known: name them, for example {name: a/b, columns: {prompt:"),
        ({"name": "a/b", "columns": {"prompt": "p", "chosen": "c"}}, "chosen and rejected need each other"),
        ({"name": "a/b", "columns": {"prompt": "m", "response": "m", "input": "i"}}, "leave input out"),
        (
            {"name": "a/b", "columns": {"prompt": "p"}},
            "the SFT stage imitates responses, a/b has none: name its column as `response` or `chosen`",
        ),
        ({"name": "builtin/chitchat", "revision": "v2"}, "is not on the Hub and has no revision v2"),
        ({"name": "a/b", "columns": {"promt": "p"}}, "columns.promt"),
        ({"name": "a/../b", "columns": {"prompt": "p", "response": "r"}}, "should be organisation/name"),
        ({"name": "a/b", "revision": "../x", "columns": {"prompt": "p", "response": "r"}}, "revision"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_reported(entry, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(own_tree() | {"scenarios": {"a": {"sft": {"datasets": [entry]}}}})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a/b", "a: sft.datasets.0 = 'a/b' (from scenarios.a): the columns of a/b are not known"),
        (
            {"name": "a/b", "columns": {"prompt": "p", "respons": "r"}},
            "a: sft.datasets.0.columns.respons = 'r' (from scenarios.a): no such field; did you mean response?",
        ),
        (
            {"name": "builtin/chitchat", "revision": "v2"},
            "a: sft.datasets.0.name = 'builtin/chitchat', sft.datasets.0.revision = 'v2' (from scenarios.a): ",
        ),
    ],
)
def test_a_mistake_in_a_list_is_the_scenario_s_own(entry, said):
    assert the_mistake(a={"sft": {"datasets": [entry]}}).startswith(said)


def test_a_dataset_is_in_a_list_once():
    assert "builtin/chitchat is here more than once" in the_mistake(
        a={"sft": {"datasets": ["builtin/chitchat", {"name": "builtin/chitchat", "split": "test"}]}}
    )


def test_a_known_dataset_needs_its_name_only():
    tree = written(a={"sft": {"datasets": ["Dahoas/rm-static"]}})
    (found,) = load_config(tree).scenarios["a"].sft.datasets
    assert (found.columns.chosen, found.columns.dialogue, found.revision) == ("chosen", True, "main")


def test_a_reward_model_needs_pairs():
    assert (
        "the reward stage compares responses, builtin/chitchat has no pairs: name `chosen` and `rejected`"
        in the_mistake(a={"reward": {"datasets": ["builtin/chitchat"]}})
    )


@pytest.mark.parametrize("shares", [{"sft": 0}, {"reward": -1}])
def test_every_stage_needs_a_share(shares):
    assert "should be greater than 0" in the_mistake(a={"data": {"shares": shares}})


SECTION = "should be a mapping with"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actor": "a/b"}, f"actor = 'a/b' (from scenarios.a): {SECTION} model, revision"),
        (
            {"sft": {"lora": True}},
            f"sft.lora = True (from scenarios.a): {SECTION} dim, alpha, learning_rate, targets, only (adapters;"
            " null: train all weights)",
        ),
        (
            {"sft": {"datasets": [1]}},
            f"sft.datasets.0 = 1 (from scenarios.a): {SECTION} name, revision, split, subset, encoding, columns"
            " (a list of names, or of {name, revision, split, subset, encoding, columns})",
        ),
        (
            {"sft": {"datasets": "x"}},
            "sft.datasets = 'x' (from scenarios.a): should be a list (a list of names,",
        ),
        (
            {"sft": {"datasets": {"name": "a/b"}}},
            "sft.datasets = {'name': 'a/b'} (from scenarios.a): should be a list (a list of names,",
        ),
        (
            {"sft": {"datasets": []}},
            "sft.datasets = [] (from scenarios.a): should have at least 1 item, not 0 (",
        ),
        (
            {"sft": {"optimizer": {"betas": [0.9]}}},
            "sft.optimizer.betas = [0.9] (from scenarios.a): should have at least 2 items, not 1 (Adam's",
        ),
        (
            {"sft": {"optimizer": {"betas": [0.9, 0.9, 0.9]}}},
            "sft.optimizer.betas = [0.9, 0.9, 0.9] (from scenarios.a): should have at most 2 items, not 3 (Adam's",
        ),
        (
            {"sft": {"optimizer": {"betas": 0.9}}},
            "should be a list (Adam's moment decay rates: a list of two)",
        ),
        (
            {"data": {"shares": 3}},
            "data.shares = 3 (from scenarios.a): should be a mapping with sft, reward, rlhf",
        ),
        ({"actor": {"model": 3}}, "actor.model = 3 (from scenarios.a): should be a string (where"),
        (
            {"rlhf": {"shuffle_scores": "maybe"}},
            "= 'maybe' (from scenarios.a): should be true or false (control",
        ),
    ],
)
def test_a_value_of_another_type_is_reported_with_what_to_write(change, said):
    assert said in the_mistake(a=change)


@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_fp16_needs_gpus(stage):
    assert the_mistake(a={stage: {"dtype": "fp16"}}) == (
        f"a: {stage}.dtype = 'fp16' (from scenarios.a), {stage}.run.gpus = 0 (from defaults): fp16 is trained on"
        " GPUs only: choose bf16 or fp32, or gpus above 0"
    )
    load_config(written(a={stage: {"dtype": "fp16", "run": {"gpus": 1}}}))


def test_a_coefficient_of_0_cannot_follow_a_target():
    said = the_mistake(a={"rlhf": {"kl_coef": 0, "kl_target": 6}})
    assert said.startswith(
        "a: rlhf.kl_target = 6, rlhf.kl_coef = 0 (from scenarios.a): an adaptive kl_coef is multiplied, and 0 stays 0"
    )
    load_config(written(a={"rlhf": {"kl_coef": 0}}))


@pytest.mark.parametrize("name", ["Tiny", "a b", "-a", "a/b", "ä"])
def test_a_name_that_makes_no_directory_is_refused(name):
    assert name in the_mistake(**{name: {}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"defaults": [1]},
            "defaults = [1] (from config.yaml, --configfile or --config): should be a mapping",
        ),
        (
            {"pvc": 3},
            "pvc = 3 (from config.yaml, --configfile or --config): should be the path of a directory",
        ),
        ({"scenarios": {1: {}}}, "scenarios.1: a scenario's name is"),
        ({"scenarios": {"a": {1: 2, "seed": -1}}}, "a: 1 = 2 (from scenarios.a): no such field; known"),
        ({"scenarios": {"a": {"data": {"shares": {1: 2}}, "seed": -1}}}, "a: data.shares.1"),
        ({"scenarios": {"a": {"rlhf": 3, "seed": -1}}}, "a: rlhf = 3 (from scenarios.a)"),
        ({"scenarios": {"a": {"base": ["b"]}}}, "scenarios.a: base = ['b']: should be a scenario's name"),
        ({"scenarios": {"a": {"sft": {"max_tokens": None}}}}, "a: sft.max_tokens = None (from scenarios.a)"),
        ({"scenarios": {"a": {"rlhf": {"kl_target": 6, "kl_horizon": 10}}}}, "kl_horizon 64 or more"),
    ],
)
def test_odd_shapes_are_reported_like_any_mistake(change, said):
    tree = {**own_tree(), **change}
    with pytest.raises(ConfigError) as error:
        load_config(tree)
    assert said in str(error.value)


def test_one_unknown_dataset_is_one_mistake():
    tree = own_tree()
    tree["scenarios"] = {"a": {"sft": {"datasets": ["builtin/such"]}}}
    with pytest.raises(ConfigError, match=r"^1 mistake"):
        load_config(tree)


@pytest.mark.parametrize(("what", "zero", "least"), [("optimizer", 0, 1), ("parameters", 2, 3)])
def test_offloaded_state_must_be_sharded(what, zero, least):
    said = the_mistake(a={"sft": {"run": {"offload": [what], "zero_stage": zero}}})
    assert f"offload of {what} needs zero_stage {least} or more" in said
    assert f"sft.run.zero_stage = {zero} (from scenarios.a)" in said


FOUR = {"processes": 4, "zero_stage": 3, "micro_batch_size": 8}


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {**FOUR, "zero_stage": 2, "inference_tp_size": 2},
            "below zero_stage 3 every process has the whole actor",
        ),
        (
            {**FOUR, "inference_tp_size": 3},
            "among the 4 processes of a node: choose inference_tp_size from 1, 2, 4",
        ),
        ({**FOUR, "nodes": 2, "inference_tp_size": 4}, "among the 2 processes of a node"),
        ({**FOUR, "inference_tp_size": 2}, "inference_tp_size should divide the actor's 3 heads"),
    ],
)
def test_copies_of_the_actor_are_shared_evenly_within_a_node(run, said):
    assert said in the_mistake(a={"rlhf": {"run": run}})


def test_four_gpus_share_a_copy_of_the_largest_actor():
    made = load_config(own_tree())
    sizes = {name: s.rlhf.run.inference_tp_size for name, s in made.scenarios.items()}
    assert sizes["multi-node"] == 4
    assert set(sizes.values()) == {1, 4}


def test_the_reference_is_offloaded_by_ppo_alone():
    assert "reference" in the_mistake(a={"sft": {"run": {"offload": ["reference"]}}})
    load_config(written(a={"rlhf": {"run": {"offload": ["reference"]}}}))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"nodes": 2, "gpus": 4, "processes": 4}, "each GPU has one process: choose processes 8"),
        ({"nodes": 2, "processes": 3}, "all nodes have equally many processes: choose processes 2 or 4"),
    ],
)
def test_processes_fit_nodes_and_gpus(run, said):
    assert said in the_mistake(a={"sft": {"run": run}})


@pytest.mark.parametrize("name", ["single-gpu", "single-node", "multi-node"])
def test_deepspeed_chats_scenarios_hold_its_values(name):
    """Global batches, lengths, shares and machines of DeepSpeed-Chat's nine files."""
    made = load_config(own_tree()).scenarios[name]
    size, batch, prompts, nodes, gpus = {
        "single-gpu": ("1.3b", 8, 16, 1, 1),
        "single-node": ("13b", 32, 32, 1, 4),
        "multi-node": ("66b", 128, 64, 2, 8),
    }[name]
    assert made.actor.model == f"facebook/opt-{size}"
    assert (made.sft.train_batch_size, made.reward.train_batch_size, made.rlhf.rollout_batch_size) == (
        batch,
        batch,
        prompts,
    )
    assert made.data.shares.model_dump() == {"sft": 2, "reward": 4, "rlhf": 4}
    assert (made.sft.max_tokens, made.rlhf.max_prompt_tokens, made.rlhf.max_new_tokens) == (512, 256, 256)
    assert (made.sft.epochs, made.reward.epochs, made.rlhf.epochs, made.seed) == (2, 1, 1, 1234)
    for run in (made.sft.run, made.reward.run, made.rlhf.run):
        assert (run.nodes, run.gpus, run.processes) == (nodes, gpus, nodes * gpus)
    assert [d.name for d in made.sft.datasets] == [d.name for d in made.reward.datasets]
    assert [d.name for d in made.rlhf.datasets] == ["Dahoas/rm-static"]


def test_under_lora_there_is_no_reference_to_offload():
    lora = {"dim": 4, "alpha": 4.0, "learning_rate": 1.0e-3}
    said = the_mistake(a={"rlhf": {"actor_lora": lora, "run": {"offload": ["reference"]}}})
    assert "there is no copy to offload" in said
    both = {"actor_lora": lora | {"only": False}, "run": {"offload": ["reference"]}}
    load_config(written(a={"rlhf": both}))
