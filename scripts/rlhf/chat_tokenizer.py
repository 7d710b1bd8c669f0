"""A published tokenizer, made fit for chat: a template, an EOS, a padding token of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.errors import DataError, first_line
from rlhf.templates import HUMAN_ASSISTANT
from rlhf.weights import UNUSABLE, read_config

logger = logging.getLogger(__name__)

# Tokens that families keep for padding, or that may serve; never one that ends a text.
PADS = ("<pad>", "<|padding|>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
NEW_PAD = "<|pad|>"


def has_vocabulary(names: Iterable[str]) -> bool:
    """Return whether a tokenizer can be made of these files."""
    present = set(names)
    return (
        bool(present & {"tokenizer.json", "vocab.txt"})
        or {"vocab.json", "merges.txt"} <= present
        or any(name.endswith(".model") for name in present)
    )


def bring(source: Path, out: Path) -> None:
    """Write the tokenizer of a published model as one that loads whole, with template and padding.

    Raises:
        DataError: it has no EOS, or neither a token nor a place for padding.
    """
    read_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNUSABLE as error:
        raise DataError(
            f"the tokenizer in {source} cannot be read ({first_line(error)}): bring its files again"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise DataError(f"{source} needs a fast tokenizer with an EOS token")
    if tokenizer.chat_template is None:
        logger.info("the model has no chat template: it gets the one with Human: and Assistant: turns")
        tokenizer.chat_template = HUMAN_ASSISTANT
    _give_padding(tokenizer, source)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(out)


def _give_padding(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Set a padding token that is neither EOS nor BOS, and has a row in the embedding."""
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    known = tokenizer.get_vocab()
    candidates = [tokenizer.pad_token, *PADS]
    pad = next((t for t in candidates if t in known and t not in ends), None)
    if pad is None:
        rows = read_config(source).vocab_size
        if len(tokenizer) >= rows:
            raise DataError(
                f"{source}: the vocabulary has no token for padding and the embedding no free row"
                f" ({len(tokenizer)} of {rows} are used): choose a model that has one"
            )
        pad = NEW_PAD
    if pad != tokenizer.pad_token:
        logger.info("padding token: %s (the model's own: %s)", pad, tokenizer.pad_token)
        tokenizer.add_special_tokens({"pad_token": pad})
