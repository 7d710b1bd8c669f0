from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data.templates import (
    ASSISTANT,
    TURN_TOKENS,
    USER,
    differences,
    load_tokenizer,
    prompt_texts,
    response_texts,
)
from rlhf.errors import DataError

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", USER, ASSISTANT]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=20)
chats = st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0)


def new_tokenizer(template=TURN_TOKENS, **tokens):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["how are you", "I am well, how are you"] * 3, trainer)
    tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=template,
        padding_side="left",
        **tokens,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def halves(tokenizer, turns):
    """Return the texts of prompt and response of a chat that ends with the assistant."""
    prompts = prompt_texts(tokenizer, [turns[:-1]])
    return prompts[0], response_texts(tokenizer, [turns[:-1]], prompts, turns[-1:])[0]


def whole(tokenizer, turns):
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(turns=chats)
def test_prompt_and_response_are_together_the_whole_conversation(tokenizer, turns):
    assert "".join(halves(tokenizer, turns)) == whole(tokenizer, turns)


@quick
@given(turns=chats)
def test_bos_is_the_first_token_and_occurs_once(tokenizer, turns):
    prompt, response = (encoded(tokenizer, half) for half in halves(tokenizer, turns))
    assert prompt[0] == tokenizer.bos_token_id
    assert (prompt + response).count(tokenizer.bos_token_id) == 1


@quick
@given(turns=chats)
def test_eos_ends_the_response_and_each_response_before_it(tokenizer, turns):
    prompt, response = (encoded(tokenizer, half) for half in halves(tokenizer, turns))
    assert response[-1] == tokenizer.eos_token_id
    assert response.count(tokenizer.eos_token_id) == 1
    assert prompt.count(tokenizer.eos_token_id) == len(turns) // 2 - 1


@quick
@given(turns=chats)
def test_prompt_and_response_are_tokenised_as_the_whole_conversation(tokenizer, turns):
    prompt, response = (encoded(tokenizer, half) for half in halves(tokenizer, turns))
    assert prompt + response == encoded(tokenizer, whole(tokenizer, turns))


@quick
@given(turns=chats)
def test_a_decoded_response_is_its_text(tokenizer, turns):
    _, response = halves(tokenizer, turns)
    assert tokenizer.decode(encoded(tokenizer, response), skip_special_tokens=True) == turns[-1]


def test_many_prompts_are_rendered_as_one_by_one(tokenizer):
    prompts = [["a"], ["b", "c", "d"]]
    together = prompt_texts(tokenizer, prompts)
    assert together == [prompt_texts(tokenizer, [p])[0] for p in prompts]
    responses = response_texts(tokenizer, prompts, together, ["x", "y"])
    assert responses == [halves(tokenizer, [*p, r])[1] for p, r in zip(prompts, "xy", strict=True)]


def test_a_prompt_that_ends_with_the_assistants_turn_is_refused(tokenizer):
    with pytest.raises(DataError, match="ends with the user's turn"):
        prompt_texts(tokenizer, [["a"], ["a", "b"]])


def test_a_template_that_closes_turns_itself_gets_no_second_eos():
    prompt, response = halves(new_tokenizer(CHATML, eos_token="<|im_end|>"), ["a", "b"])
    assert response == "b<|im_end|>"
    assert prompt.endswith("<|im_start|>assistant\n")


def test_a_template_without_eos_gets_one():
    _, response = halves(new_tokenizer(CHATML), ["a", "b"])
    assert response == "b<|im_end|></s>"


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="changes the prompt when a response follows"):
        halves(new_tokenizer(template), ["a", "b"])


@pytest.mark.parametrize(
    ("tokenizer_", "why"),
    [
        (lambda: new_tokenizer(template=None), "no chat template"),
        (lambda: new_tokenizer(pad_token="</s>"), "EOS and a padding token that differ"),
        (lambda: new_tokenizer(pad_token=None), "EOS and a padding token that differ"),
        (lambda: new_tokenizer(eos_token=None), "EOS and a padding token that differ"),
    ],
)
def test_a_tokenizer_that_cannot_train_is_refused(tmp_path, tokenizer_, why):
    tokenizer_().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=why):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_loaded_as_it_was_saved(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    turns = ["how are you", "I am well"]
    assert halves(loaded, turns) == halves(tokenizer, turns)
    assert encoded(loaded, whole(loaded, turns)) == encoded(tokenizer, whole(tokenizer, turns))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"chat_template": "{{ 'other' }}"}, ["chat template"]),
        ({"eos_token": "<unk>", "pad_token": "<unk>"}, ["EOS", "padding"]),
    ],
)
def test_differences_between_tokenizers_are_named(tokenizer, change, expected):
    other = copy.deepcopy(tokenizer)
    for name, value in change.items():
        setattr(other, name, value)
    assert differences(tokenizer, other) == expected


@pytest.mark.parametrize("text", [None, "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error_with_its_path(tmp_path, text):
    new_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=f"the tokenizer of {tmp_path} cannot be read: ."):
        load_tokenizer(tmp_path)
