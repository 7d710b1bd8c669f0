from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlhf.config import yaml_file
from rlhf.errors import UserError

CONFIG = Path(__file__).parents[3] / "config.yaml"


def written(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    return tmp_path / "a.yaml"


def test_our_own_configuration_is_read_as_pyyaml_reads_it():
    assert yaml_file.read(CONFIG) == yaml.safe_load(CONFIG.read_text())


def test_a_merge_may_be_overridden_also_through_an_alias(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n"
    assert yaml_file.read(written(tmp_path, text))["c"] == {"x": 3, "y": 4}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tiny: {}\nother: {}\ntiny: {}\n", "line 3: tiny is twice"),
        ("a: {rlhf: {kl_coef: 0.1}, rlhf: {iterations: 80}}\n", "line 1: rlhf is twice"),
        ("- a list\n", "should be a mapping"),
        ("a: [1\n", "line 2: "),
        ("a: 1\n? [b, c]\n: 2\n", "line 2: a key should be a name, not a list or a mapping"),
        ("a: {? {b: c} : 2}\n", "line 1: a key should be a name"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, text, why):
    with pytest.raises(UserError, match=why):
        yaml_file.read(written(tmp_path, text))


def test_an_empty_file_is_an_empty_mapping_and_a_missing_one_is_reported(tmp_path):
    assert yaml_file.read(written(tmp_path, "# nothing\n")) == {}
    with pytest.raises(UserError, match="cannot be read"):
        yaml_file.read(tmp_path / "none.yaml")
