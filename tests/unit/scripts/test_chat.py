from __future__ import annotations

import sys
from types import SimpleNamespace

import chat
import pytest

from rlhf.errors import UserError, run_main
from rlhf.generation.sampling import Sampling

MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))


class Tokenizer:
    """A token per character, two of them the template's."""

    def apply_chat_template(self, chats, **_):
        return ["<" + "".join(message["content"] for message in messages) + ">" for messages in chats]

    def __call__(self, text, **_):
        return {"input_ids": [[1] * len(text)]}


def refused(monkeypatch, capsys, *arguments):
    """Return what a call that ends with exit code 2 says."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_main(chat.main)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(monkeypatch, capsys, prompt):
    assert "--prompt is empty" in refused(monkeypatch, capsys, "nowhere", "--prompt", prompt)


def test_the_actors_in_a_directory_are_named(monkeypatch, capsys, tmp_path):
    for name, architecture in (("actor", "OPTForCausalLM"), ("critic", "OPTForSequenceClassification")):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    (tmp_path / "results/tiny/rlhf").mkdir(parents=True)
    (tmp_path / "results/tiny/rlhf/actor").symlink_to(tmp_path / "store/actor")
    for where, actor in (("store", "store"), ("results/tiny", "results/tiny/rlhf")):
        said = refused(monkeypatch, capsys, tmp_path / where)
        assert said.endswith(
            f"{where} is not a model directory (no config.json): give {tmp_path / actor}/actor\n"
        )
    assert "build the model with snakemake" in refused(monkeypatch, capsys, tmp_path / "nowhere")


def test_a_response_that_leaves_no_room_is_reported_with_the_most_there_can_be():
    assert chat.longest_prompt(MODEL, Tokenizer(), Sampling(253, 1.0, 0, 1)) == 3
    with pytest.raises(UserError, match=r"--max-new-tokens 254 .* has 256 positions, give at most 253$"):
        chat.longest_prompt(MODEL, Tokenizer(), Sampling(254, 1.0, 0, 1))
