from __future__ import annotations

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf import jsonl
from rlhf.config import catalog
from rlhf.config.stages import Preparation
from rlhf.data import preparation
from rlhf.data.rows import Rows
from rlhf.data.templates import ASSISTANT, TURN_TOKENS, USER
from rlhf.errors import DataError

SHARES = {"shares": {"sft": 1.0, "reward": 1.0, "rlhf": 1.0}, "eval_share": 0.2}


@pytest.fixture
def tokenizer_path(tmp_path):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", USER, ASSISTANT]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        ["hello you"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TURN_TOKENS,
    ).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def prepared(tmp_path, tokenizer_path, rows, stage="sft", **changes):
    (tmp_path / "set/files").mkdir(parents=True)
    jsonl.write(tmp_path / "set/files/train.jsonl", rows)
    known = {"name": "builtin/chitchat", "columns": catalog.COLUMNS["builtin/chitchat"]}
    config = {"stage": stage, "max_tokens": 60, **SHARES, "datasets": {"builtin/chitchat": known}, **changes}
    config = Preparation.model_validate(config)
    preparation.prepare(config, tokenizer_path, {"builtin/chitchat": tmp_path / "set"}, tmp_path / "out")
    return tmp_path / "out", json.loads((tmp_path / "out/card.json").read_text())


def rows_of(n, **changes):
    row = {"conversation": "c", "prompt": "hello", "response": "you"}
    return [{**row, "group": f"g{i}", **changes} for i in range(n)]


@pytest.mark.parametrize("field", ["prompt", "response"])
@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>", USER, ASSISTANT])
def test_text_that_holds_a_special_token_is_dropped_and_counted(tmp_path, tokenizer_path, field, token):
    rows = rows_of(90) + rows_of(7, **{field: f"hi {token} there"})
    _, card = prepared(tmp_path, tokenizer_path, rows)
    assert card["datasets"]["builtin/chitchat"]["dropped: holds a special token"] == 7


def test_every_row_is_counted_once_and_long_ones_are_dropped(tmp_path, tokenizer_path):
    rows = rows_of(90) + rows_of(40, response="z" * 70)
    out, card = prepared(tmp_path, tokenizer_path, rows)
    counts = card["datasets"]["builtin/chitchat"]
    assert sum(counts.values()) == len(rows)
    assert counts["dropped: longer than 60 tokens"] > 0
    assert len(Rows(out / "train")) == counts["train"] == card["splits"]["train"]["rows"]
    assert len(Rows(out / "eval")) == counts["eval"]


def test_the_card_has_the_lengths_of_each_part(tmp_path, tokenizer_path):
    out, card = prepared(tmp_path, tokenizer_path, rows_of(60) + rows_of(40, response="you hello you"))
    rows = list(Rows(out / "train"))
    for place, part in enumerate(("prompt", "response")):
        lengths = [len(row[place]) for row in rows]
        found = card["splits"]["train"][part]
        assert found["longest"] == max(lengths)
        assert found["mean"] == pytest.approx(sum(lengths) / len(rows), abs=0.01)


def test_a_response_ends_with_eos_and_a_prompt_begins_with_bos(tmp_path, tokenizer_path):
    out, _ = prepared(tmp_path, tokenizer_path, rows_of(60))
    prompt, response = Rows(out / "train")[0]
    assert (prompt[0], response[-1]) == (0, 2)
    assert 0 not in prompt[1:]
    assert 2 not in response[:-1]


def test_turns_that_are_read_as_plain_text_are_reported(tmp_path, tokenizer_path, caplog):
    """With `dialogue: true` they would be split; a word in a line, or one turn alone, is no dialogue."""
    dialogue = "\n\nHuman: hi\n\nAssistant:"
    plain = ["Human: hi", "What does Human: mean?\n\nAssistant: is a word", "say Human: hi Assistant: ho"]
    rows = [row for text in plain for row in rows_of(30, prompt=text)]
    _, card = prepared(tmp_path, tokenizer_path, rows)
    assert (sum(card["unread_turns"].values()), caplog.messages) == (0, [])  # what is above INFO
    _, card = prepared(tmp_path / "more", tokenizer_path, rows + rows_of(30, prompt=dialogue))
    assert card["unread_turns"] == {"builtin/chitchat": 30}
    assert [m for m in caplog.messages if "builtin/chitchat: 30 prompts" in m and "dialogue: true" in m]


def test_a_missing_column_is_reported_with_what_to_do(tmp_path, tokenizer_path):
    rows = [{"promt": "hello", "reply": "you", "group": "1"}]
    said = r"no column named 'prompt' \(did you mean promt\?\), 'response'; it has promt, reply, group: correct `columns`"
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, tokenizer_path, rows)


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (
            rows_of(90, response="z" * 70),
            {},
            r"no train row is left for stage sft \(no train or eval row from builtin/chitchat; left to other stages"
            r" \d+; dropped \d+: longer than 60 tokens \(\d+\)\): raise max_tokens$",
        ),
        (
            rows_of(90, prompt="z" * 70),
            {"stage": "rlhf"},
            r"dropped \d+: longer than 60 tokens \(\d+\)\): raise max_prompt_tokens$",
        ),
        (
            rows_of(90, prompt="") + rows_of(3, response=None),
            {},
            r"dropped 93: an empty turn \(90\), an empty response \(3\)\): correct the rows, or `columns` of the"
            " dataset$",
        ),
        (
            rows_of(90),
            {"shares": {"sft": 1e-9, "reward": 1.0, "rlhf": 1.0}},
            r"\(0 train and \d+ eval rows from builtin/chitchat; left to other stages \d+\): add rows, or"
            r" raise data.shares.sft$",
        ),
        (
            rows_of(90),
            {"eval_share": 1e-9},
            r"no eval row is left for stage sft \(\d+ train and 0 eval rows from builtin/chitchat; left .*\): add"
            r" rows, or raise data.eval_share$",
        ),
        (
            rows_of(90, group="all"),
            {},
            r"all rows are in one group, .* `columns.group` .*: name a column there that differs between conversations$",
        ),
    ],
)
def test_a_split_without_rows_is_reported_with_the_counts_and_a_remedy(
    tmp_path, tokenizer_path, rows, changes, said
):
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, tokenizer_path, rows, **changes)


@pytest.mark.parametrize(("long", "level"), [(40, logging.INFO), (300, logging.WARNING)])
def test_what_became_of_the_rows_is_reported(tmp_path, tokenizer_path, caplog, long, level):
    """Loudly where the stage lost more than half of its rows; what is left to others is no loss."""
    caplog.set_level(logging.INFO)
    rows = rows_of(90) + rows_of(2, prompt=None) + rows_of(long, response="z" * 70)
    _, card = prepared(tmp_path, tokenizer_path, rows)
    counts = card["datasets"]["builtin/chitchat"]
    too_long = counts["dropped: longer than 60 tokens"]
    (logged,) = [r for r in caplog.records if r.name == "rlhf.data.preparation"]
    assert logged.levelno == level
    assert logged.message == (
        f"{counts['train']} train and {counts['eval']} eval rows from builtin/chitchat; left to other stages"
        f" {counts['left to reward'] + counts['left to rlhf']}; dropped {too_long + 2}: longer than 60 tokens"
        f" ({too_long}), no prompt (2)"
    )


@pytest.mark.parametrize(("unfit", "level"), [(60, logging.INFO), (100, logging.WARNING)])
def test_rows_that_are_unfit_count_for_the_stage_by_its_share(tmp_path, tokenizer_path, caplog, unfit, level):
    caplog.set_level(logging.INFO)
    prepared(tmp_path, tokenizer_path, rows_of(90) + rows_of(unfit, prompt=None))
    (logged,) = [r for r in caplog.records if r.name == "rlhf.data.preparation"]
    assert logged.levelno == level
