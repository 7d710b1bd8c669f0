from __future__ import annotations

import json

import pytest
import yaml

from rlhf.errors import DataError
from rlhf.models import card
from rlhf.store import publishing

MODEL, SCORER, BUILT_IN = "facebook/opt-1.3b", "facebook/opt-350m", "builtin/opt-2x64-bpe1024"


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """An actor and a reward model from the Hub, trained on a dataset of the Hub and one of the volume."""
    monkeypatch.chdir(tmp_path)
    write("a", "model", {"model": MODEL, "revision": "main"})
    write("b", "model", {"model": SCORER, "revision": "main"})
    write("made", "model", {"model": BUILT_IN, "seed": 1})
    write("hub", "dataset", {"dataset": "Dahoas/rm-static", "revision": "main"})
    write("local", "dataset", {"dataset": "./mine.jsonl", "fingerprint": "0"})
    write("data", "data", {}, {"tokenizer": "a", "dataset:x": "hub", "dataset:y": "local"})
    write("sft", "sft", {}, {"model": "a", "data": "data"})
    write("pairs", "data", {}, {"tokenizer": "b", "dataset:x": "hub"})
    write("reward", "reward", {}, {"model": "b", "data": "pairs"})
    return tmp_path


def write(name, stage, config, parents=()):
    with publishing.publish(
        publishing.Path(name), {"stage": stage, "config": config, "parents": dict(parents)}
    ):
        pass


def made(volume, stage, parents, auto_class="AutoModelForCausalLM", metrics=()):
    """Return the front matter and the rest of a card."""
    spec = {"stage": stage, "config": {"seed": 1}, "parents": parents}
    card.write(volume, "A model", spec, dict(metrics), auto_class)
    _, front, text = (volume / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


PPO = {"data": "data", "sft": "sft", "reward": "reward"}


def test_the_front_matter_names_what_the_hub_knows_and_nothing_twice(volume):
    front, _ = made(volume, "rlhf", PPO)
    assert front == {
        "pipeline_tag": "text-generation",
        "tags": ["rlhf"],
        "base_model": [MODEL],
        "datasets": ["Dahoas/rm-static"],
    }
    critic, _ = made(volume, "rlhf", PPO, "AutoModelForSequenceClassification")
    assert (critic["pipeline_tag"], critic["base_model"]) == ("text-classification", [SCORER])
    assert made(volume, "sft", {"model": "a", "data": "data"})[0]["tags"] == ["rlhf", "sft"]
    assert "base_model" not in made(volume, "sft", {"model": "made", "data": "data"})[0]


def test_the_models_and_datasets_at_the_beginning_are_named(volume):
    _, text = made(volume, "rlhf", PPO)
    assert f"- pretrained models: `{MODEL}`, `{SCORER}`\n" in text
    assert "- original datasets: `Dahoas/rm-static`, `./mine.jsonl`\n" in text


def test_figures_say_what_they_are_and_counts_are_whole_numbers(volume):
    metrics = {"eval_loss": 3.92164, "eval_rows": 2048.0, "tiny": 2.62872e-05, "many": 1234570.0}
    _, text = made(volume, "sft", {"model": "a", "data": "data"}, metrics=metrics)
    assert "- eval_loss: 3.92164\n- eval_rows: 2048\n- tiny: 2.62872e-05\n- many: 1234570\n" in text
    assert "On held-out rows" in text
    _, text = made(volume, "rlhf", PPO)
    assert "last tenth of PPO's iterations" in text
    assert "`results/{scenario}/rlhf/eval`" in text


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_the_example_is_code_and_the_configuration_json(volume, auto_class):
    _, text = made(volume, "rlhf", PPO, auto_class)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == {"seed": 1}


def test_a_parent_that_is_no_artefact_is_reported(volume):
    with pytest.raises(DataError, match="nowhere has no provenance"):
        made(volume, "sft", {"model": "nowhere", "data": "data"})
