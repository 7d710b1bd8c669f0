"""Importing a published tokenizer for chat: with a template, an EOS, and a separate padding token."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.templates import HUMAN_ASSISTANT
from rlhf.errors import DataError, first_line
from rlhf.sources.weights import UNUSABLE, read_config

logger = logging.getLogger(__name__)

# Tokens that can be used for padding, if they are neither EOS nor BOS of the family.
PADS = ("<pad>", "<|padding|>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
NEW_PAD = "<|pad|>"


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
        DataError: it cannot be read, has no EOS, or has neither a padding token nor a free row for one.
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
