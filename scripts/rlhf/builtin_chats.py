"""Built-in text that needs no account and no network: real chats.

The text is the PyPI package `chitchat-dataset` (7,168 chats between people, MIT licence). What is
preferred is known: the reply whose VADER compound score is higher.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import chitchat_dataset

from rlhf import jsonl
from rlhf.errors import UserError
from rlhf.judges import vader
from rlhf.progress import progress

MAX_WORDS = 24  # of a turn; longer ones are left out, so that small models see whole replies
BLOCK = 8  # chats whose replies may meet in a pair, and which stay in one phase
RIVALS = 2  # replies of other conversations that each reply is compared with
MIN_GAP = 0.05  # between the scores of a pair: below it nothing is preferred


def chats() -> Iterator[tuple[str, list[str]]]:
    """Yield (id, turns) of every chat; a turn joins the messages of one speaker."""
    for name, chat in chitchat_dataset.Dataset().items():
        yield name, [" ".join(" ".join(m["text"] for m in turn).split()) for turn in chat["messages"]]


def replies() -> Iterator[dict[str, str]]:
    """Yield a turn and the reply to it, both short and not empty; `group` is a block of chats."""
    for number, (name, turns) in enumerate(chats()):
        for prompt, response in pairwise(turns):
            if all(0 < len(text.split()) <= MAX_WORDS for text in (prompt, response)):
                group = f"chats-{number // BLOCK}"
                yield {"group": group, "conversation": name, "prompt": prompt, "response": response}


def pairs() -> Iterator[dict[str, str]]:
    """Yield a turn with its own reply and another conversation's, the higher score preferred.

    The other conversation is of the same block, so that no reply is seen in two phases.
    """
    draw = random.Random("chitchat-pairs")
    for _, block in groupby(replies(), key=lambda row: row["group"]):
        rows = list(block)
        for row, _ in product(rows, range(RIVALS)):
            other = draw.choice(rows)
            if other["conversation"] != row["conversation"]:
                yield from _preferred(row, row["response"], other["response"])


def _preferred(row: dict[str, str], first: str, second: str) -> Iterator[dict[str, str]]:
    """Yield the pair with the higher score as chosen, unless the scores are about the same."""
    gap = vader(first) - vader(second)
    if abs(gap) >= MIN_GAP:
        chosen, rejected = (first, second) if gap > 0 else (second, first)
        kept = {name: row[name] for name in ("group", "conversation", "prompt")}
        yield {**kept, "chosen": chosen, "rejected": rejected}


DATASETS: dict[str, Callable[[], Iterator[dict[str, str]]]] = {
    "builtin/chitchat": replies,
    "builtin/chitchat-pairs": pairs,
}


def write_dataset(config: dict[str, Any], path: Path) -> None:
    """Write a built-in dataset as `files/train.jsonl`.

    Raises:
        UserError: the installed package has another version than the artefact's name says.
    """
    installed = importlib.metadata.version("chitchat-dataset")
    if installed != config["package"]:
        raise UserError(
            f"chitchat-dataset {installed} is installed, {config['package']} is what is meant:"
            f" pip install chitchat-dataset=={config['package']}"
        )
    rows = progress(DATASETS[config["dataset"]](), config["dataset"], unit="rows")
    (path / "files").mkdir()
    jsonl.write(path / "files/train.jsonl", rows)
