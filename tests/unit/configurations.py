"""The repository's own configuration, others like it, and what is wrong with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from rlhf.config.scenario import load_config
from rlhf.errors import ConfigError

ROOT = Path(__file__).parents[2]


def own_tree():
    """Return what the repository's `config.yaml` says."""
    return yaml.safe_load((ROOT / "config.yaml").read_text())


def written(**scenarios):
    """Return the repository's defaults with other scenarios."""
    return own_tree() | {"scenarios": copy.deepcopy(scenarios)}


def mistakes(tree):
    """Return the lines of what `load_config` says, without the headline."""
    with pytest.raises(ConfigError) as caught:
        load_config(tree)
    headline, *lines = str(caught.value).split("\n")
    assert headline.startswith(f"{len(lines)} mistake")
    return [line.removeprefix("  - ") for line in lines]


def the_mistake(**scenarios):
    """Return the one mistake of scenarios beside the repository's defaults."""
    (only,) = mistakes(written(**scenarios))
    return only
