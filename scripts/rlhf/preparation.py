"""From raw rows to tokenised splits: adapt, assign to a phase, render, tokenise, drop and count."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf import datafiles, store
from rlhf.adapters import Prompt, Unusable, adapt, has_turns
from rlhf.errors import DataError
from rlhf.progress import progress
from rlhf.rows import PARTS, Rows, RowWriter
from rlhf.splits import EVAL, phase_of
from rlhf.templates import load_tokenizer, prompt_texts, response_texts

logger = logging.getLogger(__name__)

CHUNK = 1000  # rows that are tokenised in one call


def prepare(config: dict[str, Any], tokenizer_path: Path, datasets: dict[str, Path], out: Path) -> None:
    """Write the splits `train` and `eval` of a phase, and `card.json`.

    Args:
        datasets: name -> its artefact; `config["datasets"]` says how to read each.

    Raises:
        DataError: a dataset cannot be read, or no row is left for one of the splits.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    phase, parts = config["phase"], PARTS[config["phase"]]
    counters = {name: Counter[str]() for name in datasets}
    card: dict[str, Any] = {"phase": phase, "parts": list(parts), "datasets": counters, "splits": {}}
    card["unread_turns"] = Counter()  # dataset -> prompts that hold turns, and are read as one
    with RowWriter(out / "train", parts) as train, RowWriter(out / EVAL, parts) as held_out:
        for name, path in datasets.items():
            counts = counters[name]
            mine = _mine(name, path, config, card, _any_of(tokenizer.all_special_tokens))
            for split, tokens in _tokenised(mine, tokenizer):
                if sum(map(len, tokens[:1])) + max(map(len, tokens[1:]), default=0) > config["max_tokens"]:
                    counts[f"dropped: longer than {config['max_tokens']} tokens"] += 1
                    continue
                (held_out if split == EVAL else train).append(tokens)
                counts[split] += 1
            _tell(name, card["unread_turns"][name])
    for split in ("train", EVAL):
        card["splits"][split] = _statistics(Rows(out / split), parts)
        if not card["splits"][split]["rows"]:
            raise DataError(f"no {split} row for phase {phase}: {json.dumps(counters, sort_keys=True)}")
    store.write_json(out / "card.json", card)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _tell(name: str, unread_turns: int) -> None:
    if unread_turns:
        logger.warning(
            "%s: %d prompts hold Human: and Assistant: turns, each prompt is read as one turn of the user; if"
            " they are dialogues, set columns.dialogue: true",
            name,
            unread_turns,
        )


def _mine(
    name: str, path: Path, config: dict[str, Any], card: dict[str, Any], special: re.Pattern[str]
) -> Iterator[tuple[str, Prompt]]:
    """Yield (split, row) of the rows that this phase trains on or is measured on; count the others."""
    how, counts = config["datasets"][name], card["datasets"][name]
    for raw in progress(datafiles.read(path, how["split"], name), name, unit="rows"):
        try:
            row = adapt(raw, how["columns"], config["phase"])
        except Unusable as error:
            counts[f"dropped: {error}"] += 1
            continue
        except KeyError as error:
            raise DataError(
                f"{name} has no column {error}; it has {', '.join(raw)}: name the one to read in `columns` of the"
                " dataset"
            ) from None
        if any(special.search(text) for text in (*row.turns, *row.texts())):
            # It would be read as the end of a turn, not as what somebody wrote.
            counts["dropped: holds a special token"] += 1
            continue
        card["unread_turns"][name] += has_turns(row.turns[0])
        phase = phase_of(row.group, config["shares"], config["eval_share"])
        if phase in (EVAL, config["phase"]):
            yield EVAL if phase == EVAL else "train", row
        else:
            counts[f"left to {phase}"] += 1


def _tokenised(
    rows: Iterable[tuple[str, Prompt]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield (split, token ids part by part); many rows are tokenised in one call."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        prompts = [row.turns for _, row in chunk]
        texts = prompt_texts(tokenizer, prompts)
        columns = [texts]
        for replies in zip(*(row.texts() for _, row in chunk), strict=True):
            columns.append(response_texts(tokenizer, prompts, texts, replies))
        ids = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in columns]
        for (split, _), *parts in zip(chunk, *ids, strict=True):
            yield split, parts


def _statistics(rows: Rows, parts: Sequence[str]) -> dict[str, Any]:
    """Return the counts of a split: rows, tokens, and the mean and longest of each part, in tokens."""
    lengths = rows.tokens_per_part
    if not len(lengths):
        return {"rows": 0, "tokens": 0}
    each = {
        part: {"mean": round(float(column.mean()), 2), "longest": int(column.max())}
        for part, column in zip(parts, lengths.T, strict=True)
    }
    return {"rows": len(rows), "tokens": int(lengths.sum()), **each}
