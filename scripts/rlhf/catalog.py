"""Names of sources that can be had, and what their rows are. Pure: the plan checks against it."""

from __future__ import annotations

import re

# What a dataset's rows are: a `preference` also serves as a `response` (its chosen one) and as a
# prompt, a `response` as a prompt.
DATASETS = {
    "builtin/chitchat": "response",
    "builtin/chitchat-pairs": "preference",
}
CHITCHAT_VERSION = "0.9.0"  # of the PyPI package that the built-in text comes from

OPT_SHAPE = re.compile(r"builtin/opt-(?P<layers>\d+)x(?P<hidden>\d+)-bpe(?P<vocabulary>\d+)")
HEAD_SIZE = 32
MIN_VOCABULARY = 300  # 256 bytes, the special tokens, and something to merge


def unknown_model(name: str) -> str | None:
    """Return why there is no such model, or None if there is."""
    shape = OPT_SHAPE.fullmatch(name)
    if shape is None:
        return "models: builtin/opt-{layers}x{hidden}-bpe{vocabulary}; the Hub is not read yet"
    if int(shape["hidden"]) % HEAD_SIZE or not int(shape["hidden"]) or not int(shape["layers"]):
        return f"needs at least one layer and a hidden size that is a multiple of {HEAD_SIZE}"
    if int(shape["vocabulary"]) < MIN_VOCABULARY:
        return f"needs a vocabulary of at least {MIN_VOCABULARY}"
    return None


def unknown_dataset(name: str) -> str | None:
    """Return why there is no such dataset, or None if there is."""
    return None if name in DATASETS else f"datasets: {', '.join(DATASETS)}; the Hub is not read yet"
