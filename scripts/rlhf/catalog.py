"""Names of sources and what is known about them. Pure: the configuration is checked against it.

A name that begins with `builtin/` is made here, one with `./`, `../` or `/` is a file or directory
on the volume, and `organisation/name` is a repository on the Hugging Face Hub.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Kind = Literal["builtin", "local", "hub"]

CHITCHAT_VERSION = "0.9.0"  # of the PyPI package that the built-in text comes from

# Which columns of a known dataset hold what (see `config.Columns`).
_PAIRS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
COLUMNS: dict[str, dict[str, Any]] = {
    "builtin/chitchat": {"prompt": "prompt", "response": "response", "group": "group"},
    "builtin/chitchat-pairs": {**_PAIRS, "group": "group"},
    "Dahoas/rm-static": {**_PAIRS, "dialogue": True},
    "Dahoas/full-hh-rlhf": {**_PAIRS, "dialogue": True},
    "Dahoas/synthetic-instruct-gptj-pairwise": _PAIRS,
}
BUILTIN_DATASETS = tuple(name for name in COLUMNS if name.startswith("builtin/"))

OPT_SHAPE = re.compile(r"builtin/opt-(?P<layers>\d+)x(?P<hidden>\d+)-bpe(?P<vocabulary>\d+)")
HEAD_SIZE = 32
POSITIONS = 256  # of built-in models: their longest text, in tokens
MIN_VOCABULARY = 300  # 256 bytes, the special tokens, and something to merge

_PART = r"\b[A-Za-z0-9_.-]{1,96}\b"
_HUB = re.compile(rf"{_PART}/{_PART}")  # with what `_misspelt` adds, the rule of the Hub's client
_WHAT_THERE_IS = "organisation/name on the Hub, or a path on the volume that begins with ./ or /"


def kind(name: str) -> Kind:
    """Return where a source comes from; `unknown_model` and `unknown_dataset` check it."""
    if name.startswith("builtin/"):
        return "builtin"
    return "local" if name.startswith(("./", "../", "/")) else "hub"


def known_columns(name: str) -> dict[str, Any] | None:
    """Return the columns of a known dataset, also of a copy that lies on the volume under its name."""
    return COLUMNS.get("/".join(name.rstrip("/").split("/")[-2:]) if kind(name) == "local" else name)


def unknown_model(name: str) -> str | None:
    """Return why there is no such model, or None if there may be."""
    if kind(name) != "builtin":
        return _misspelt(name)
    shape = OPT_SHAPE.fullmatch(name)
    if shape is None:
        return "no such built-in model; there are builtin/opt-{layers}x{hidden}-bpe{vocabulary}"
    if int(shape["hidden"]) % HEAD_SIZE or not int(shape["hidden"]) or not int(shape["layers"]):
        return f"needs at least one layer and a hidden size that is a multiple of {HEAD_SIZE}"
    if int(shape["vocabulary"]) < MIN_VOCABULARY:
        return f"needs a vocabulary of at least {MIN_VOCABULARY}"
    return None


def unknown_dataset(name: str) -> str | None:
    """Return why there is no such dataset, or None if there may be."""
    if kind(name) != "builtin":
        return _misspelt(name)
    return (
        None
        if name in BUILTIN_DATASETS
        else f"no such built-in dataset; there are {', '.join(BUILTIN_DATASETS)}"
    )


def _misspelt(name: str) -> str | None:
    odd = ".." in name or "--" in name or name.endswith(".git")
    fits = kind(name) == "local" or (_HUB.fullmatch(name) and not odd)
    return None if fits else f"should be {_WHAT_THERE_IS}"
