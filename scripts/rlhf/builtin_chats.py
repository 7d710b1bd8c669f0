"""Built-in text that needs no account and no network: real chats.

The text is the PyPI package `chitchat-dataset` (7,168 chats between people, MIT licence). What is
preferred is known: the reply whose VADER compound score is higher.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import chitchat_dataset

from rlhf import jsonl, store
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


def replies(counts: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield a turn and the reply to it, both short and not empty; `group` is a block of chats.

    What is left out is counted, here and in `pairs`.
    """
    for number, (name, turns) in enumerate(chats()):
        for prompt, response in pairwise(turns):
            if all(0 < len(text.split()) <= MAX_WORDS for text in (prompt, response)):
                group = f"chats-{number // BLOCK}"
                yield {"group": group, "conversation": name, "prompt": prompt, "response": response}
            else:
                counts[f"left out: a turn is empty or longer than {MAX_WORDS} words"] += 1


def pairs(counts: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield a turn with its own reply and another conversation's, the higher score preferred.

    The other conversation is of the same block, so that no reply is seen in two phases.
    """
    draw = random.Random("chitchat-pairs")
    for _, block in groupby(replies(counts), key=lambda row: row["group"]):
        rows = list(block)
        for row, _ in product(rows, range(RIVALS)):
            other = draw.choice(rows)
            if other["conversation"] == row["conversation"]:
                counts["left out: both replies are of one conversation"] += 1
            elif (pair := _preferred(row, row["response"], other["response"])) is None:
                counts[f"left out: scores closer than {MIN_GAP}"] += 1
            else:
                yield pair


def _preferred(row: dict[str, str], first: str, second: str) -> dict[str, str] | None:
    """Return the pair with the higher score as chosen, or None where the scores are about the same."""
    gap = vader(first) - vader(second)
    if abs(gap) < MIN_GAP:
        return None
    chosen, rejected = (first, second) if gap > 0 else (second, first)
    kept = {name: row[name] for name in ("group", "conversation", "prompt")}
    return {**kept, "chosen": chosen, "rejected": rejected}


DATASETS: dict[str, Callable[[Counter[str]], Iterator[dict[str, str]]]] = {
    "builtin/chitchat": replies,
    "builtin/chitchat-pairs": pairs,
}


def write_dataset(config: dict[str, Any], path: Path) -> None:
    """Write a built-in dataset as `files/train.jsonl`, and `card.json` with what was left out.

    Raises:
        UserError: the installed package has another version than the artefact's name says.
    """
    installed = importlib.metadata.version("chitchat-dataset")
    if installed != config["package"]:
        raise UserError(
            f"chitchat-dataset {installed} is installed, {config['package']} is what is meant:"
            f" pip install chitchat-dataset=={config['package']}"
        )
    counts: Counter[str] = Counter()
    rows = progress(DATASETS[config["dataset"]](counts), config["dataset"], unit="rows")
    (path / "files").mkdir()
    jsonl.write(path / "files/train.jsonl", (_counted(row, counts) for row in rows))
    store.write_json(path / "card.json", dict(sorted(counts.items())))


def _counted(row: dict[str, str], counts: Counter[str]) -> dict[str, str]:
    counts["rows"] += 1
    return row
