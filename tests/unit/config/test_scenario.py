from __future__ import annotations

import copy

import pytest
import yaml
from configurations import mistakes, own_tree, the_mistake, written

from rlhf.config.scenario import load_config


def test_the_repositorys_own_file_loads():
    loaded = load_config(own_tree())
    assert {"tiny", "smoke"} <= set(loaded.scenarios)


def test_a_user_can_write_a_scenario_in_yaml_only():
    tree = own_tree()
    tree["scenarios"] |= yaml.safe_load("""
    mine:
      base: smoke
      seed: 7
      rlhf: {kl_coef: 0.1, actor: {learning_rate: 1.0e-5}}
    """)
    loaded = load_config(tree).scenarios
    mine, smoke = loaded["mine"], loaded["smoke"]
    assert (mine.seed, mine.rlhf.kl_coef, mine.rlhf.actor.learning_rate) == (7, 0.1, 1e-5)
    assert (mine.sft, mine.reward, mine.rlhf.critic) == (smoke.sft, smoke.reward, smoke.rlhf.critic)


def test_a_scenario_without_a_value_is_the_defaults():
    loaded = load_config(written(a=None, b={})).scenarios
    assert loaded["a"] == loaded["b"]


def test_the_order_of_base_and_scenario_in_the_file_is_free():
    above = load_config(written(b={"base": "a"}, a={"seed": 3})).scenarios
    below = load_config(written(a={"seed": 3}, b={"base": "a"})).scenarios
    assert dict(above) == dict(below)
    assert above["b"].seed == 3


def test_loading_leaves_the_tree_as_it_was():
    tree = written(a={"base": "b"}, b={"seed": 2})
    before = copy.deepcopy(tree)
    load_config(tree)
    assert tree == before


def test_a_configuration_cannot_be_changed_afterwards():
    scenario = load_config(written(a={})).scenarios["a"]
    with pytest.raises(ValueError, match="frozen"):
        scenario.seed = 2


def test_all_mistakes_are_reported_at_once():
    lines = mistakes(
        written(
            a={"seed": -1, "sft": {"max_tokens": 1}, "rlhf": {"gamma": 2.0}},
            b={"base": "nowhere"},
            c={"reward": {"dtype": "fp8"}},
        )
    )
    assert lines == [
        "a: seed = -1 (from scenarios.a): should be greater than or equal to 0 (seed of everything random)",
        "a: sft.max_tokens = 1 (from scenarios.a): should be greater than or equal to 2"
        " (longest prompt + response; longer rows are dropped)",
        "a: rlhf.gamma = 2.0 (from scenarios.a): should be less than or equal to 1 (discount per token)",
        "scenarios.b: base = 'nowhere': no such scenario; there are: a, b, c",
        "c: reward.dtype = 'fp8' (from scenarios.c): should be 'bf16', 'fp16' or 'fp32' (type of weights and activations; fp16 on GPUs only)",
    ]


def test_a_misspelt_field_is_reported_with_the_one_meant():
    assert the_mistake(a={"sft": {"max_token": 3}}) == (
        "a: sft.max_token = 3 (from scenarios.a): no such field; did you mean max_tokens?"
    )
    assert the_mistake(a={"rlhf": {"actor": {"learning_rat": 1.0}}}) == (
        "a: rlhf.actor.learning_rat = 1.0 (from scenarios.a): no such field; did you mean learning_rate?"
    )


def test_a_field_like_no_other_is_reported_with_those_there_are():
    assert the_mistake(a={"data": {"zzz": 3}}) == (
        "a: data.zzz = 3 (from scenarios.a): no such field; known here: shares, eval_share"
    )


def test_a_misspelt_section_is_reported_with_the_one_that_was_meant():
    assert the_mistake(a={"rlfh": {}}).endswith("no such field; did you mean rlhf?")


def test_a_misspelt_share_is_reported_with_the_one_meant():
    assert the_mistake(a={"data": {"shares": {"rhlf": 3}}}) == (
        "a: data.shares.rhlf = 3 (from scenarios.a): no such field; did you mean rlhf?"
    )


def test_a_misspelt_key_of_the_file_itself_is_reported():
    assert mistakes(written(a={"seed": -1}) | {"scenario": 1})[0] == (
        "scenario = 1 (from config.yaml, --configfile or --config): no such field; did you mean scenarios?"
    )


def test_a_mistake_is_that_of_the_layer_that_wrote_the_value_and_is_reported_once():
    tree = written(low={"sft": {"eval_rows": 0}}, high={"base": "low"})
    assert [line.split(": ")[:2] for line in mistakes(tree)] == [
        ["low", "sft.eval_rows = 0 (from scenarios.low)"]
    ]


def test_values_of_two_layers_that_do_not_go_together_are_the_scenarios_mistake():
    low, high = {"rlhf": {"kl_target": 5.0}}, {"base": "low", "rlhf": {"kl_coef": 0}}
    (line,) = mistakes(written(low=low, high=high))
    assert line.startswith(
        "high: rlhf.kl_target = 5.0 (from scenarios.low), rlhf.kl_coef = 0 (from scenarios.high)"
    )


def test_the_origin_of_a_bad_default_is_defaults():
    tree = written(a={})
    tree["defaults"]["seed"] = -3
    assert mistakes(tree)[0].startswith("every scenario: seed = -3 (from defaults): ")


def test_checks_of_several_fields_are_reported_beside_mistakes_of_one():
    lines = mistakes(written(a={"seed": -1, "rlhf": {"kl_coef": -1, "mini_batches": 3, "epochs": 2}}))
    text = "\n".join(lines)
    assert len(lines) == 4
    assert "seed = -1" in text
    assert "kl_coef = -1" in text
    assert "give either epochs or iterations" in text
    assert "rlhf.mini_batches = 3 (from scenarios.a)" in text


WRONG = {  # a wrong field, one of a list, sections in conflict, and conflicts between sections
    "seed": -1,
    "sft": {"max_tokens": 300, "datasets": ["a/b"]},
    "reward": {"model": "builtin/opt-2x64-bpe512", "run": {"processes": 3, "nodes": 2}},
    "rlhf": {
        "epochs": 1,
        "kl_target": 6,
        "kl_horizon": 10,
        "run": {"inference_tp_size": 2},
    },
}


def test_every_conflict_is_a_line_of_its_own_whatever_else_is_wrong():
    fields = [line.removeprefix("a: ").split(" = ")[0] for line in mistakes(written(a=WRONG))]
    assert sorted(fields) == [
        "actor.model",
        "reward.run.processes",
        "rlhf.epochs",
        "rlhf.kl_horizon",
        "rlhf.run.inference_tp_size",
        "rlhf.run.inference_tp_size",
        "seed",
        "sft.datasets.0",
        "sft.max_tokens",
    ]


@pytest.mark.parametrize("part", WRONG)
def test_a_mistake_is_reported_in_the_same_words_beside_others(part):
    alone, all_ = (mistakes(written(a=wrong)) for wrong in ({part: WRONG[part]}, WRONG))
    assert set(alone) <= set(all_)


def test_a_conflict_names_every_value_and_the_layer_that_wrote_it():
    tree = written(low={"sft": {"train_batch_size": 48}}, high={"base": "low"})
    assert mistakes(tree)[1] == (
        "high: sft.train_batch_size = 48 (from scenarios.low), sft.run.micro_batch_size = 64,"
        " sft.run.processes = 1 (from defaults): train_batch_size should be a multiple of micro_batch_size"
        " x processes: choose 64"
    )


def test_nothing_is_reported_about_values_that_replace_wrong_ones():
    """Below the wrong batch is one of 64, which three processes could not share."""
    lines = mistakes(written(a={"sft": {"train_batch_size": 0, "run": {"processes": 3}}}))
    assert [line.split(" = ")[0] for line in lines] == ["a: sft.train_batch_size"]


def test_what_all_scenarios_inherit_is_reported_once():
    tree = written(a={}, b={})
    tree["defaults"]["seed"] = -3
    assert len(mistakes(tree)) == 1


def test_a_text_that_is_longer_than_a_built_in_models_positions_is_reported():
    said = the_mistake(a={"rlhf": {"max_prompt_tokens": 250}, "eval": {"max_new_tokens": 2}})
    assert "rlhf.max_new_tokens = 24" in said
    assert "274 tokens are more than the 256 positions" in said


def test_a_value_that_is_missing_everywhere_is_named_with_its_meaning():
    tree = written(a={})
    del tree["defaults"]["rlhf"]["clip_range"]
    assert mistakes(tree) == [
        "a: rlhf.clip_range is missing: set it in defaults or in the scenario (clipping range of the policy ratio)"
    ]


def test_a_circle_of_bases_is_reported_with_its_path():
    lines = mistakes(written(a={"base": "b"}, b={"base": "c"}, c={"base": "a"}))
    assert lines[0] == "scenarios.a: circular base: a -> b -> c -> a"
    assert len(lines) == 3


def test_a_scenario_cannot_be_its_own_base():
    assert the_mistake(a={"base": "a"}) == "scenarios.a: circular base: a -> a"


def test_an_unknown_base_is_reported_with_the_one_meant_or_those_there_are():
    assert the_mistake(tiny={}, a={"base": "tine"}) == (
        "scenarios.a: base = 'tine': no such scenario; did you mean tiny?"
    )
    assert the_mistake(tiny={}, a={"base": "x"}) == (
        "scenarios.a: base = 'x': no such scenario; there are: tiny, a"
    )


WRONG_AND_IN_CONFLICT = {"seed": -1, "sft": {"epochs": 1}}  # `steps` are the defaults'


@pytest.mark.parametrize("base", ["nowhere", 3, "a"])
def test_a_wrong_base_hides_no_other_mistake_and_adds_none(base):
    """What does not go together with the defaults may go with what the base should have been."""
    _, own = mistakes(written(a={"base": base, **WRONG_AND_IN_CONFLICT}))
    assert (
        own
        == "a: seed = -1 (from scenarios.a): should be greater than or equal to 0 (seed of everything random)"
    )


def test_a_wrong_name_hides_no_mistake_of_its_scenario():
    named, *own = mistakes(written(A=WRONG_AND_IN_CONFLICT))
    assert named.startswith("scenarios.A: ")
    assert [line.split(" = ")[0] for line in own] == ["A: seed", "A: sft.epochs"]


@pytest.mark.parametrize("defaults", [[1], 3])
def test_defaults_that_are_no_mapping_hide_no_other_mistake(defaults):
    first, own = mistakes(written(a=WRONG_AND_IN_CONFLICT) | {"defaults": defaults})
    assert first.startswith(f"defaults = {defaults!r} (from config.yaml")
    assert own.startswith("a: seed = -1")


def test_a_scenario_that_is_no_mapping_is_reported():
    assert the_mistake(a=[1]) == "scenarios.a = [1]: should be a mapping"
