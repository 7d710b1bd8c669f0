"""Names of models and datasets, and what is known about them.

A source whose name begins with `builtin/` is generated here. A name with `./`, `../` or `/` is a path
on the volume, and `organisation/name` is a repository on the Hugging Face Hub. This module reads
neither: the configuration is checked without a network.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Origin = Literal["builtin", "local", "hub"]

CHITCHAT_VERSION = "0.9.0"  # of the PyPI package with the built-in text

# The columns of known datasets (see `config.sources.Columns`).
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
POSITIONS = 256  # of built-in models: the longest sequence, in tokens
MIN_VOCABULARY = 300  # 256 bytes, the special tokens, and some merges

_WORD = r"\b[A-Za-z0-9_.-]{1,96}\b"
_HUB = re.compile(rf"{_WORD}/{_WORD}")  # together with `_misspelt`, the rule of the Hub's client
_FORMS = "organisation/name on the Hub, or a path on the volume that begins with ./ or /"


def origin(name: str) -> Origin:
    """Return where a source comes from, by its name alone: whether it exists is not checked."""
    if name.startswith("builtin/"):
        return "builtin"
    return "local" if name.startswith(("./", "../", "/")) else "hub"


def known_columns(name: str) -> dict[str, Any] | None:
    """Return the columns of a known dataset, also of its copy on the volume; None for other datasets."""
    return COLUMNS.get("/".join(name.rstrip("/").split("/")[-2:]) if origin(name) == "local" else name)


def unknown_model(name: str) -> str | None:
    """Return why there is no such model, or None if it may exist."""
    if origin(name) != "builtin":
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
    """Return why there is no such dataset, or None if it may exist."""
    if origin(name) != "builtin":
        return _misspelt(name)
    if name in BUILTIN_DATASETS:
        return None
    return f"no such built-in dataset; there are {', '.join(BUILTIN_DATASETS)}"


def _misspelt(name: str) -> str | None:
    """Return why neither the Hub nor the volume can have such a name, or None if one can."""
    forbidden = ".." in name or "--" in name or name.endswith(".git")
    valid = origin(name) == "local" or (_HUB.fullmatch(name) and not forbidden)
    return None if valid else f"should be {_FORMS}"
