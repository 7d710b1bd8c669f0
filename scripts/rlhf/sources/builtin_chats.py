"""Built-in datasets of real chats, which need no account and no network.

The text is from the PyPI package `chitchat-dataset` (7,168 chats between people, MIT licence). The
preference is known: the response with the higher VADER compound score is chosen.
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

from rlhf import files, jsonl
from rlhf.data.sentiment import vader
from rlhf.errors import UserError
from rlhf.progress import progress
from rlhf.store.layout import CARD, FILES

MAX_WORDS = 24  # of a turn; longer ones are left out, because small models have few positions
BLOCK = 8  # consecutive chats of a group: their responses are paired, and stay in one stage
RIVALS = 2  # responses of other conversations that each response is compared with
MIN_GAP = 0.05  # between the scores of a pair; a smaller gap is no preference


def chats() -> Iterator[tuple[str, list[str]]]:
    """Yield (id, turns) of every chat; consecutive messages of a speaker are one turn."""
    for name, chat in chitchat_dataset.Dataset().items():
        yield name, [" ".join(" ".join(m["text"] for m in turn).split()) for turn in chat["messages"]]


def responses(counts: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield a row for each turn and the response to it, if both are short and not empty.

    Its `group` is a block of chats. `counts` gets the number of turns that are left out, by reason.
    """
    for number, (name, turns) in enumerate(chats()):
        for prompt, response in pairwise(turns):
            if all(0 < len(text.split()) <= MAX_WORDS for text in (prompt, response)):
                group = f"chats-{number // BLOCK}"
                yield {"group": group, "conversation": name, "prompt": prompt, "response": response}
            else:
                counts[f"left out: a turn is empty or longer than {MAX_WORDS} words"] += 1


def pairs(counts: Counter[str]) -> Iterator[dict[str, str]]:
    """Yield a turn with its own response and one of another conversation; the higher score is chosen.

    The other conversation is in the same block, so that a response is in one stage only. `counts` gets
    the number of pairs that are left out, by reason.
    """
    draw = random.Random("chitchat-pairs")
    for _, block in groupby(responses(counts), key=lambda row: row["group"]):
        rows = list(block)
        for row, _ in product(rows, range(RIVALS)):
            other = draw.choice(rows)
            if other["conversation"] == row["conversation"]:
                counts["left out: both responses are of one conversation"] += 1
            elif (pair := _preferred(row, row["response"], other["response"])) is None:
                counts[f"left out: scores closer than {MIN_GAP}"] += 1
            else:
                yield pair


def _preferred(row: dict[str, str], first: str, second: str) -> dict[str, str] | None:
    """Return the pair with the higher score as chosen, or None if the scores are too close."""
    gap = vader(first) - vader(second)
    if abs(gap) < MIN_GAP:
        return None
    chosen, rejected = (first, second) if gap > 0 else (second, first)
    kept = {name: row[name] for name in ("group", "conversation", "prompt")}
    return {**kept, "chosen": chosen, "rejected": rejected}


DATASETS: dict[str, Callable[[Counter[str]], Iterator[dict[str, str]]]] = {
    "builtin/chitchat": responses,
    "builtin/chitchat-pairs": pairs,
}


def write_dataset(config: dict[str, Any], path: Path) -> None:
    """Write a built-in dataset as `files/train.jsonl`, and `card.json` with the counts.

    Raises:
        UserError: the installed package is not the version in the configuration.
    """
    installed = importlib.metadata.version("chitchat-dataset")
    if installed != config["package"]:
        raise UserError(
            f"chitchat-dataset {installed} is installed, but {config['package']} is required:"
            f" pip install chitchat-dataset=={config['package']}"
        )
    counts: Counter[str] = Counter()
    rows = progress(DATASETS[config["dataset"]](counts), config["dataset"], unit="rows")
    (path / FILES).mkdir()
    jsonl.write(path / FILES / "train.jsonl", (_counted(row, counts) for row in rows))
    files.write_json(path / CARD, dict(sorted(counts.items())))


def _counted(row: dict[str, str], counts: Counter[str]) -> dict[str, str]:
    counts["rows"] += 1
    return row
