"""A copy of the actor that two processes share: the same replies, half of the weights each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import trainings
from transformers import AutoConfig

from rlhf import families as known
from rlhf.errors import UserError

NAMES = list(families.FAMILIES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (family, processes per copy, rank) -> replies, and sizes of the copy's parameters."""
    root = tmp_path_factory.mktemp("copies")
    for name in NAMES:
        families.tiny(name).save_pretrained(root / name)
    trainings.write_rows(root / "data", "rlhf", vocabulary=64)
    command = [
        sys.executable, str(trainings.SCRIPTS / "launch.py"), "--processes", "2", "--log", str(root / "log"),
        str(Path(__file__).with_name("copies.py")), str(root), str(root / "data"),
        *(f"{name}={root / name}" for name in NAMES),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, env=trainings.environment(), check=False)
    assert done.returncode == 0, (root / "log").read_text()[-4000:]
    return {
        (name, size, rank): torch.load(root / f"{name}-{size}-{rank}.pt")
        for name in NAMES for size in (1, 2) for rank in (0, 1)
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_replies_are_those_of_a_gathered_copy(made, name):
    for rank in (0, 1):
        gathered, shared = made[name, 1, rank][0], made[name, 2, rank][0]
        assert shared == gathered
        assert len(gathered) == 8


def test_replies_of_a_shared_copy_end_where_they_end(made):
    assert len({len(reply) for name in NAMES for reply in made[name, 2, 0][0]}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_each_process_has_half_of_the_linear_layers_and_all_of_the_rest(made, name):
    family = families.tiny(name).config.model_type
    layers, writers = known.LINEAR[family], known.WRITERS[family]
    whole = made[name, 1, 0][1]
    for rank in (0, 1):
        part = made[name, 2, rank][1]
        assert part.keys() == whole.keys()
        for parameter, size in whole.items():
            layer, kind = parameter.split(".")[-2:]
            is_cut = layer in layers and not (kind == "bias" and layer in writers)
            assert part[parameter] == (size // 2 if is_cut else size), parameter
        # Embeddings, norms and biases stay whole: little in a large model, not in a tiny one.
        inside = [n for n in whole if ".layers." in n]
        assert sum(part[n] for n in inside) < 0.55 * sum(whole[n] for n in inside)


def test_heads_that_cannot_be_shared_out_are_refused_with_what_can():
    with pytest.raises(UserError, match="2 key-value heads cannot be shared out evenly; choose one of 1, 2"):
        known.refuse_uneven(families.tiny("llama").config, 4)
    with pytest.raises(UserError, match="2 attention heads and 2 key-value heads and 64 MLP channels"):
        known.refuse_uneven(families.tiny("gpt-neox").config, 3)
    for name in NAMES:
        known.refuse_uneven(families.tiny(name).config, 2)


def test_a_family_that_is_not_known_is_not_cut():
    with pytest.raises(UserError, match=r"a gpt2 model cannot be cut \(those that can: opt, gpt_neox, llama"):
        known.refuse_uneven(AutoConfig.for_model("gpt2"), 2)
