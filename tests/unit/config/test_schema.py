"""The JSON schema that editors use for config.yaml."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from rlhf.config.schema import config_schema, text

ROOT = Path(__file__).parents[3]
TREE = yaml.safe_load((ROOT / "config.yaml").read_text())


def test_the_schema_in_the_repository_is_current():
    assert (ROOT / "config.schema.json").read_text() == text(), "run `make schema`"


def test_config_yaml_names_its_schema_and_is_valid():
    assert (
        (ROOT / "config.yaml").read_text().startswith("# yaml-language-server: $schema=config.schema.json\n")
    )
    jsonschema.Draft202012Validator.check_schema(config_schema())
    jsonschema.validate(TREE, config_schema())


@pytest.mark.parametrize(
    "scenario", [None, {}, {"base": "tiny", "rlhf": {"kl_coef": 0.4}}, {"sft": {"datasets": ["a/b"]}}]
)
def test_a_scenario_says_only_what_differs(scenario):
    jsonschema.validate({**TREE, "scenarios": {"mine": scenario}}, config_schema())


@pytest.mark.parametrize(
    "scenario",
    [
        {"rlhf": {"kl_coeff": 0.4}},
        {"rlhf": {"kl_coef": -1}},
        {"sft": {"dtype": "fp8"}},
        {"sft": {"datasets": [{"split": "train"}]}},
        {"sft": {"datasets": [{"name": "a/b", "columns": {"response": "answer"}}]}},
    ],
)
def test_mistakes_are_marked(scenario):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**TREE, "scenarios": {"mine": scenario}}, config_schema())
