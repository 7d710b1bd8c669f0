"""From raw rows to tokenised splits: adapt, assign to a phase, render, tokenise, drop and count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf import jsonl, store
from rlhf.adapters import ADAPTERS, Row, for_phase
from rlhf.errors import DataError
from rlhf.progress import progress
from rlhf.rows import PARTS, Rows, RowWriter
from rlhf.splits import EVAL, phase_of
from rlhf.templates import load_tokenizer, prompt_texts, response_texts

CHUNK = 1000  # rows that are tokenised in one call


def prepare(config: dict[str, Any], tokenizer_path: Path, datasets: dict[str, Path], out: Path) -> None:
    """Write the splits `train` and `eval` of a phase, and `card.json`.

    Raises:
        DataError: no row is left for one of the splits.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    special = tokenizer.all_special_tokens
    phase, parts = config["phase"], PARTS[config["phase"]]
    card: dict[str, Any] = {"phase": phase, "parts": list(parts), "datasets": {}, "splits": {}}
    with RowWriter(out / "train", parts) as train, RowWriter(out / EVAL, parts) as held_out:
        for name, path in datasets.items():
            counts: Counter[str] = Counter()
            for split, tokens in _tokenised(_mine(name, path, config, counts, special), tokenizer, phase):
                if sum(map(len, tokens[:1])) + max(map(len, tokens[1:]), default=0) > config["max_tokens"]:
                    counts[f"dropped: longer than {config['max_tokens']} tokens"] += 1
                    continue
                (held_out if split == EVAL else train).append(tokens)
                counts[split] += 1
            card["datasets"][name] = dict(sorted(counts.items()))
    for split in ("train", EVAL):
        card["splits"][split] = _statistics(Rows(out / split))
        if not card["splits"][split]["rows"]:
            raise DataError(f"no {split} row for phase {phase}: {card['datasets']}")
    store.write_json(out / "card.json", card)


def _mine(
    name: str, path: Path, config: dict[str, Any], counts: Counter[str], special: Iterable[str]
) -> Iterator[tuple[str, Row]]:
    """Yield (split, row) of the rows that this phase trains on or is measured on."""
    for raw in progress(jsonl.read(path / "train.jsonl"), name, unit="rows"):
        row = ADAPTERS[name](raw)
        if any(token in text for text in (*row.turns, *row.texts()) for token in special):
            # It would be read as the end of a turn, not as what somebody wrote.
            counts["dropped: holds a special token"] += 1
            continue
        phase = phase_of(row.group, config["shares"], config["eval_share"])
        if phase == EVAL:
            yield EVAL, row
        elif phase == config["phase"]:
            yield "train", row
        else:
            counts["left to other phases"] += 1


def _tokenised(
    rows: Iterable[tuple[str, Row]], tokenizer: PreTrainedTokenizerFast, phase: str
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield (split, token ids part by part); many rows are tokenised in one call."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        prompts = [row.turns for _, row in chunk]
        texts = prompt_texts(tokenizer, prompts)
        columns = [texts]
        for replies in zip(*(for_phase(row, phase) for _, row in chunk), strict=True):
            columns.append(response_texts(tokenizer, prompts, texts, replies))
        ids = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in columns]
        for (split, _), *parts in zip(chunk, *ids, strict=True):
            yield split, parts


def _statistics(rows: Rows) -> dict[str, Any]:
    lengths = rows.tokens_per_row
    if not len(lengths):
        return {"rows": 0, "tokens": 0}
    mean = round(float(lengths.mean()), 2)
    return {"rows": len(rows), "tokens": int(lengths.sum()), "mean": mean, "longest": int(lengths.max())}
