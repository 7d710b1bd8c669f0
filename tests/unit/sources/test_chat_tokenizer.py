"""A tokenizer is checked against its model when it is imported, and its template against the clock."""

from __future__ import annotations

import datetime
import logging

import pytest
from transformers import OPTConfig, PreTrainedTokenizerFast

from rlhf.data.templates import load_tokenizer, prompt_texts
from rlhf.errors import DataError
from rlhf.sources.builtin_opt import _tokenizer
from rlhf.sources.chat_tokenizer import import_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer(320)


@pytest.fixture
def imported(tokenizer, tmp_path):
    """Return a function that imports a tokenizer with a template beside an embedding of some rows."""

    def run(template=None, rows=320, added=()):
        changed = PreTrainedTokenizerFast.from_pretrained(saved(tokenizer, tmp_path / "plain"))
        changed.chat_template = template or changed.chat_template
        changed.add_tokens(list(added))
        source = saved(changed, tmp_path / "model")
        OPTConfig(vocab_size=rows).save_pretrained(source)
        import_tokenizer(source, tmp_path / "out")
        return load_tokenizer(tmp_path / "out")

    return run


def saved(tokenizer, path):
    tokenizer.save_pretrained(path)
    return path


def test_tokens_without_a_row_of_the_embedding_are_refused(imported):
    """huggingface/transformers#12763: training ended in an index error, or an assert on the GPU."""
    with pytest.raises(
        DataError, match=r"2 tokens have no row .* has 320: <a> \(320\), <b> \(321\)\. Resize it"
    ):
        imported(added=["<a>", "<b>"])
    assert len(imported(added=["<a>", "<b>"], rows=322)) == 322


def test_a_template_with_a_clock_always_writes_the_same_date(imported, caplog):
    """sgl-project/sglang#3296: rows of one name would differ from day to day."""
    caplog.set_level(logging.INFO)
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (text,) = prompt_texts(imported(template), [["hello"]])
    assert text == "26 Jul 2024hello"
    assert str(datetime.date.today().year) not in text
    assert "the chat template writes the date" in caplog.text


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m['content'] }", "{{ raise_exception('no users here') }}", "{{ 1 / 0 }}"],
)
def test_a_broken_template_is_reported_with_its_model(imported, template):
    with pytest.raises(
        DataError, match=r"the chat template of .*model cannot be used \(.+\): correct chat_template"
    ):
        imported(template)
