"""A copy of the actor that two processes share: the same responses, half of the weights each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import trainings
from transformers import AutoConfig

from rlhf.errors import UserError
from rlhf.models.families import LAYOUTS, refuse_uneven

NAMES = list(families.FAMILIES)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return (family, processes per copy, rank) -> responses, and sizes of the copy's parameters."""
    root = tmp_path_factory.mktemp("copies")
    for name in NAMES:
        families.tiny(name).save_pretrained(root / name)
    trainings.write_rows(root / "data", "rlhf", vocabulary=64)
    command = [
        sys.executable,
        str(trainings.SCRIPTS / "launch.py"),
        "--processes",
        "2",
        "--log",
        str(root / "log"),
        str(Path(__file__).with_name("copies.py")),
        str(root),
        str(root / "data"),
        *(f"{name}={root / name}" for name in NAMES),
    ]
    done = subprocess.run(command, capture_output=True, env=trainings.environment(), check=False)
    assert done.returncode == 0, (root / "log").read_text()[-4000:]
    return {
        (name, size, rank): torch.load(root / f"{name}-{size}-{rank}.pt")
        for name in NAMES
        for size in (1, 2)
        for rank in (0, 1)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_copy_gives_the_responses_of_a_gathered_one(results, name):
    for rank in (0, 1):
        gathered, shared = results[name, 1, rank][0], results[name, 2, rank][0]
        assert shared == gathered
        assert len(gathered) == 8


def test_responses_of_a_shared_copy_end_at_different_lengths(results):
    assert len({len(response) for name in NAMES for response in results[name, 2, 0][0]}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_each_process_has_half_of_the_linear_layers_and_all_of_the_rest(results, name):
    layout = LAYOUTS[families.tiny(name).config.model_type]
    readers, writers = (*layout.qkv, *layout.up), (layout.out, layout.down)
    whole = results[name, 1, 0][1]
    for rank in (0, 1):
        part = results[name, 2, rank][1]
        assert part.keys() == whole.keys()
        for names, (size, _) in whole.items():
            layer, which = names.split("+")[0].rsplit(".", 1)
            is_split = layer.endswith(readers) or (layer.endswith(writers) and which == "weight")
            assert part[names][0] == (size // 2 if is_split else size), names
        # Embeddings, norms and biases stay whole: little in a large model, not in a tiny one.
        inside = [n for n in whole if ".layers." in n]
        assert sum(part[n][0] for n in inside) < 0.55 * sum(whole[n][0] for n in inside)


def test_heads_that_cannot_be_divided_evenly_are_refused_with_the_possible_sizes():
    with pytest.raises(UserError, match="2 key-value heads cannot be divided evenly: choose one of 1, 2"):
        refuse_uneven(families.tiny("llama").config, 4)
    with pytest.raises(UserError, match="2 attention heads and 2 key-value heads and 64 MLP channels"):
        refuse_uneven(families.tiny("gpt-neox").config, 3)
    for name in NAMES:
        refuse_uneven(families.tiny(name).config, 2)


def test_an_unknown_family_is_not_split():
    with pytest.raises(
        UserError,
        match=r"a gpt2 model cannot be divided between processes \(supported families: opt, llama",
    ):
        refuse_uneven(AutoConfig.for_model("gpt2"), 2)
    with pytest.raises(
        UserError, match=r"a mistral model with a sliding window of 64 tokens cannot be divided"
    ):
        refuse_uneven(AutoConfig.for_model("mistral", sliding_window=64), 2)
