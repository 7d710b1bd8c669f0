"""From published weights to safetensors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import hub_content
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.templates import load_tokenizer, prompt_texts, response_texts
from rlhf.errors import DataError, UserError
from rlhf.sources import chat_tokenizer, weights


def imported(source, tmp_path, ours=False):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True)
    weights.import_weights(source, out, work, ours)
    shutil.copy(source / "config.json", out)
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("like_350m", [False, True])
def test_pickles_become_the_same_model_in_safetensors(tmp_path, shards, prefix, like_350m):
    made = hub_content.opt(tmp_path / "hub", shards=shards, prefix=prefix, like_350m=like_350m)
    out = imported(tmp_path / "hub", tmp_path)
    files = sorted(p.name for p in out.iterdir())
    assert len([f for f in files if f.endswith(".safetensors")]) == shards
    assert ("model.safetensors.index.json" in files) == (shards > 1)
    assert not [f for f in files if f.endswith((".bin", ".h5", ".msgpack"))]
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    scorer = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)
    assert scorer.score.in_features == made.config.word_embed_proj_dim


def test_what_was_converted_is_not_converted_again_and_our_pickles_go(tmp_path, monkeypatch):
    hub_content.opt(tmp_path / "hub", shards=3)
    calls, convert = [], weights.Conversion.convert

    def dies_at_the_third(self, path, target):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        convert(self, path, target)

    monkeypatch.setattr(weights.Conversion, "convert", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path / "hub", tmp_path, ours=True)
    assert sorted(p.name for p in (tmp_path / "hub").glob("*.bin")) == ["pytorch_model-00003-of-00003.bin"]
    out = imported(tmp_path / "hub", tmp_path, ours=True)
    assert calls[3:] == ["pytorch_model-00003-of-00003.bin"]
    AutoModelForCausalLM.from_pretrained(out)
    assert not list((tmp_path / "hub").glob("*.bin"))


def changed(tmp_path, change):
    """Publish an OPT whose pickle was changed."""
    hub_content.opt(tmp_path / "hub")
    path = tmp_path / "hub/pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    return tmp_path / "hub"


EMBED = "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.decoder.layers.1.fc1.weight"), "lacks model.decoder.layers.1.fc1.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "has extra, which config.json does not describe"),
        (
            lambda t: t.update({EMBED: torch.zeros(3, 32)}),
            r"has shape \[3, 32\], config.json says \[600, 32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t[EMBED] + 1}),
            "ties lm_head.weight to .* they differ in the checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        imported(changed(tmp_path, change), tmp_path)


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, save):
    hub_content.opt(tmp_path / "hub")
    mark = tmp_path / "was-run"
    save({"model.decoder.embed_tokens.weight": Hostile(mark)}, tmp_path / "hub/pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"is refused: it imports posix.system; none of its code was run|is refused: it is damaged",
    ):
        imported(tmp_path / "hub", tmp_path)
    assert not mark.exists()


def test_a_pickle_of_other_things_than_tensors_is_refused(tmp_path):
    hub_content.opt(tmp_path / "hub")
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "hub/pytorch_model.bin")
    with pytest.raises(UserError, match="named tensors and nothing else"):
        imported(tmp_path / "hub", tmp_path)


def test_an_older_pickle_that_cannot_be_mapped_is_read_too(tmp_path):
    made = hub_content.opt(tmp_path / "hub")
    path = tmp_path / "hub/pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    out = imported(tmp_path / "hub", tmp_path)
    assert torch.equal(load_file(out / "model.safetensors")[EMBED], made.get_input_embeddings().weight)


def test_safetensors_are_taken_where_there_are_some(tmp_path):
    made = hub_content.opt(tmp_path / "hub")
    made.save_pretrained(tmp_path / "hub")
    names = [p.name for p in (tmp_path / "hub").iterdir()]
    assert weights.choose(names) == ["model.safetensors"]
    out = imported(tmp_path / "hub", tmp_path)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "hub/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"], ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", weights.INDEX, "x.bin"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"], ["pytorch_model.bin"]),
        (["rust_model.ot"], []),
    ],
)
def test_one_set_of_weights_is_chosen(names, chosen):
    assert weights.choose(names) == chosen


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-00001-of-00003.safetensors"], "lack model-00002-of-00003.safetensors, model-00003"),
        (["pytorch_model-00002-of-00002.bin"], "lack pytorch_model-00001-of-00002.bin, and have"),
        (["model-00001-of-00002.safetensors", "model-00001-of-00001.safetensors"], "shards of two sets"),
    ],
)
def test_a_set_with_gaps_is_refused_before_it_is_downloaded(names, said):
    with pytest.raises(UserError, match=said):
        weights.choose(names)


def safe(tmp_path, size="30KB"):
    """Publish an OPT as sharded safetensors; return its directory and the model."""
    made = hub_content.opt(tmp_path / "hub")
    (tmp_path / "hub/pytorch_model.bin").unlink()
    made.save_pretrained(tmp_path / "hub", max_shard_size=size)
    return tmp_path / "hub", made


def test_shards_of_safetensors_without_an_index_get_one(tmp_path):
    source, made = safe(tmp_path)
    (source / weights.INDEX).unlink()
    out = imported(source, tmp_path)
    assert len(list(out.glob("*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.get_input_embeddings().weight, made.get_input_embeddings().weight)


def reconfigured(source, **fields):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewritten(source, change):
    """Change the tensors of a model's safetensors."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: reconfigured(s, ffn_dim=128), r"has shape \[64.*config.json says \[128"),
        (lambda s: rewritten(s, lambda t: t.pop("model.decoder.layers.1.fc1.weight")), "lacks model.decoder"),
        (
            lambda s: rewritten(s, lambda t: t.update(extra=torch.zeros(1))),
            "has extra, which config.json does not describe",
        ),
        (
            lambda s: rewritten(s, lambda t: t.update({"lm_head.weight": t[EMBED] + 1})),
            "ties lm_head.weight to .* they differ in the checkpoint",
        ),
        (lambda s: (s / "model.safetensors").write_bytes(b"cut"), "model.safetensors is damaged"),
    ],
)
def test_safetensors_that_do_not_fit_their_configuration_are_refused(tmp_path, damage, said):
    source, _ = safe(tmp_path, "1GB")
    damage(source)
    with pytest.raises(DataError, match=said):
        imported(source, tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source, _ = safe(tmp_path)
    first, second, *_ = sorted(source.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"00001-of-\d+.safetensors and model-00002.* both contain model"):
        imported(source, tmp_path)


def test_of_a_whole_pickle_and_shards_beside_it_one_set_is_taken_with_a_line(tmp_path, caplog):
    made = hub_content.opt(tmp_path / "hub")
    hub_content.opt(tmp_path / "other", shards=2, seed=5)
    for path in (tmp_path / "other").glob("*-of-*.bin"):
        shutil.copy(path, tmp_path / "hub")
    out = imported(tmp_path / "hub", tmp_path)
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(load_file(out / "model.safetensors")[EMBED], made.get_input_embeddings().weight)
    assert "pytorch_model.bin is used, the shards beside it" in caplog.text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: reconfigured(s, model_type="newest"), "newest"),
        (
            lambda s: reconfigured(s, model_type="newest", auto_map={"AutoConfig": "x.Y"}),
            "code of a model is not run",
        ),
        (lambda s: reconfigured(s, model_type="t5"), "choose a causal language model"),
        (lambda s: (s / "config.json").write_text("{"), "download or copy it again if it is damaged"),
        (lambda s: (s / "config.json").unlink(), "config.json cannot be used"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_reported_in_one_line(tmp_path, damage, said):
    hub_content.opt(tmp_path / "hub")
    damage(tmp_path / "hub")
    for use in (imported, lambda source, place: chat_tokenizer.import_tokenizer(source, place / "out")):
        if said == "choose a causal language model" and use is not imported:
            continue
        with pytest.raises(DataError, match=said) as caught:
            use(tmp_path / "hub", tmp_path)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_read_is_reported(tmp_path):
    hub_content.opt(tmp_path / "hub")
    (tmp_path / "hub/tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"the tokenizer in .* cannot be read"):
        chat_tokenizer.import_tokenizer(tmp_path / "hub", tmp_path / "out")


def test_opts_tokenizer_gets_a_template_and_its_bos_is_there_once(tmp_path):
    hub_content.opt(tmp_path / "hub")
    chat_tokenizer.import_tokenizer(tmp_path / "hub", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    turns = [("hi", "hello", "how are you?")]
    (prompt,) = prompt_texts(tokenizer, turns)
    assert prompt == "</s>\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant:"
    assert response_texts(tokenizer, turns, [prompt], ["fine"]) == [" fine</s>"]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids.count(2) == 1
    anyone = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns[0])]
    assert anyone.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
    assert (anyone.pad_token_id, anyone.eos_token_id, anyone.bos_token_id) == (1, 2, 2)
