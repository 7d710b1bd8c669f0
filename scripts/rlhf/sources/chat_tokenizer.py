"""Importing a published tokenizer for chat: with a template, an EOS, and a separate padding token."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.templates import HUMAN_ASSISTANT, prompt_texts, response_texts
from rlhf.errors import DataError, first_line
from rlhf.sources.weights import UNUSABLE, read_config

logger = logging.getLogger(__name__)

# Tokens that can be used for padding, if they are neither EOS nor BOS of the family.
PADS = ("<pad>", "<|padding|>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
NEW_PAD = "<|pad|>"
CLOCK, DATE = "strftime_now", "26 Jul 2024"  # the function of templates; Llama 3's own date without a clock


def has_vocabulary(names: Iterable[str]) -> bool:
    """Return whether these files contain a tokenizer."""
    present = set(names)
    return (
        bool(present & {"tokenizer.json", "vocab.txt"})
        or {"vocab.json", "merges.txt"} <= present
        or any(name.endswith(".model") for name in present)
    )


def import_tokenizer(source: Path, out: Path) -> None:
    """Write the tokenizer of a published model in one format, with chat template and padding token.

    Raises:
        DataError: it cannot be read, has no EOS, has neither a padding token nor a free row for one, has tokens
            without a row of the embedding, or has a template that cannot be used.
    """
    read_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNUSABLE as error:
        raise DataError(
            f"the tokenizer in {source} cannot be read ({first_line(error)}): download or copy its files again"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise DataError(f"{source} has no fast tokenizer with an EOS token: choose a model that has one")
    if tokenizer.chat_template is None:
        logger.info("the model has no chat template: it gets one with Human: and Assistant: turns")
        tokenizer.chat_template = HUMAN_ASSISTANT
    _set_padding(tokenizer, source)
    _refuse_ids_without_rows(tokenizer, source)
    _pin_date(tokenizer)
    _refuse_broken_template(tokenizer, source)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(out)


def _set_padding(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Set a padding token that is neither EOS nor BOS, and has a row in the embedding."""
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    candidates = [tokenizer.pad_token, *PADS]
    pad = next((t for t in candidates if t in vocabulary and t not in ends), None)
    if pad is None:
        rows = read_config(source).vocab_size
        if len(tokenizer) >= rows:
            raise DataError(
                f"{source}: the vocabulary has no padding token, and the embedding has no free row for one"
                f" ({len(tokenizer)} of {rows} are used): choose another model"
            )
        pad = NEW_PAD
    if pad != tokenizer.pad_token:
        logger.info("padding token: %s (was %s)", pad, tokenizer.pad_token)
        tokenizer.add_special_tokens({"pad_token": pad})


def _refuse_ids_without_rows(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Refuse tokens that the embedding has no row for: training would end in an index error."""
    rows = read_config(source).vocab_size
    if beyond := sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows):
        listed = ", ".join(f"{token} ({i})" for i, token in beyond[:5])
        raise DataError(
            f"{source}: {len(beyond)} tokens have no row in the embedding, which has {rows}: {listed}. Resize it with"
            " resize_token_embeddings and save the model again, or remove the added tokens"
        )


def _pin_date(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let a template that writes today's date write always the same: equal names must mean equal rows."""
    template = tokenizer.chat_template
    if isinstance(template, str) and CLOCK in template:
        logger.info("the chat template writes the date: it always writes %s", DATE)
        tokenizer.chat_template = f"{{%- macro {CLOCK}(format) -%}}{DATE}{{%- endmacro -%}}{template}"


def _refuse_broken_template(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Render a conversation, so that a template's mistake is reported with its model."""
    try:
        texts = prompt_texts(tokenizer, [["Hello"], ["Hello", "Hi", "How are you?"]])
        response_texts(tokenizer, [["Hello"]], texts[:1], ["Hi"])
    except DataError:
        raise
    except Exception as error:  # a template may raise anything
        raise DataError(
            f"the chat template of {source} cannot be used ({first_line(error)}): correct chat_template in"
            " tokenizer_config.json or chat_template.jinja"
        ) from None
