"""Built-in text that needs no account and no network: real chats.

The text is the PyPI package `chitchat-dataset` (7,168 chats between people, MIT licence). What is
preferred is known: the reply whose VADER compound score is higher.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chitchat_dataset

from rlhf import jsonl
from rlhf.errors import UserError
from rlhf.judges import vader
from rlhf.progress import progress

MAX_WORDS = 24  # of a turn; longer ones are left out, so that small models see whole replies
MIN_GAP = 0.05  # between the scores of a pair: below it nothing is preferred


def chats() -> Iterator[tuple[str, list[str]]]:
    """Yield (id, turns) of every chat; a turn joins the messages of one speaker."""
    for name, chat in chitchat_dataset.Dataset().items():
        yield name, [" ".join(" ".join(m["text"] for m in turn).split()) for turn in chat["messages"]]


def replies() -> Iterator[dict[str, str]]:
    """Yield a turn and the reply to it, both short and not empty."""
    for name, turns in chats():
        for prompt, response in zip(turns, turns[1:], strict=False):
            if all(0 < len(text.split()) <= MAX_WORDS for text in (prompt, response)):
                yield {"conversation": name, "prompt": prompt, "response": response}


def pairs() -> Iterator[dict[str, str]]:
    """Yield a turn with its own reply and another conversation's, the higher score preferred."""
    rows, draw = list(replies()), random.Random("chitchat-pairs")
    for row in rows:
        other = draw.choice(rows)
        if other["conversation"] == row["conversation"]:
            continue
        first, second = row["response"], other["response"]
        gap = vader(first) - vader(second)
        if abs(gap) >= MIN_GAP:
            chosen, rejected = (first, second) if gap > 0 else (second, first)
            yield {
                "conversation": row["conversation"], "prompt": row["prompt"],
                "chosen": chosen, "rejected": rejected,
            }  # fmt: skip


DATASETS: dict[str, Callable[[], Iterator[dict[str, str]]]] = {
    "builtin/chitchat": replies,
    "builtin/chitchat-pairs": pairs,
}


def write_dataset(config: dict[str, Any], path: Path) -> None:
    """Write a built-in dataset as `train.jsonl`.

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
    jsonl.write(path / "train.jsonl", rows)
