"""From raw rows to tokenised splits: adapt, assign to a phase, render, tokenise, drop and count."""

from __future__ import annotations

import difflib
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
DROPPED, LEFT = "dropped: ", "left to "  # how counts of the card begin, before the reason and the phase
TOO_LONG = "longer than"


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
                    counts[f"{DROPPED}{TOO_LONG} {config['max_tokens']} tokens"] += 1
                    continue
                (held_out if split == EVAL else train).append(tokens)
                counts[split] += 1
            _tell(name, counts, card["unread_turns"][name])
    for split in ("train", EVAL):
        card["splits"][split] = _statistics(Rows(out / split), parts)
        if not card["splits"][split]["rows"]:
            raise DataError(_no_row(split, phase, counters))
    store.write_json(out / "card.json", card)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _tell(name: str, counts: Counter[str], unread_turns: int) -> None:
    """Log what became of a dataset's rows, and what is odd about them."""
    logger.log(
        logging.WARNING if _kept_share(counts) < 0.5 else logging.INFO, "%s", _what_became(name, counts)
    )
    if unread_turns:
        logger.warning(
            "%s: %d prompts hold Human: and Assistant: turns, each prompt is read as one turn of the user; if"
            " they are dialogues, set columns.dialogue: true",
            name,
            unread_turns,
        )


def _reasons(counts: Counter[str]) -> Counter[str]:
    """Return why rows were dropped, and how many."""
    return Counter({k.removeprefix(DROPPED): n for k, n in counts.items() if k.startswith(DROPPED)})


def _kept_share(counts: Counter[str]) -> float:
    """Return which share of the rows that a phase could have had are left.

    What is unfit is dropped before it is known whose it would be, what is too long after that.
    """
    kept = counts["train"] + counts[EVAL]
    reasons = _reasons(counts)
    too_long = sum(n for reason, n in reasons.items() if reason.startswith(TOO_LONG))
    fit = counts.total() - (reasons.total() - too_long)
    return kept / max(1, kept + too_long) * fit / max(1, counts.total())


def _what_became(name: str, counts: Counter[str]) -> str:
    """Return in words what became of the rows of a dataset."""
    train, held_out, reasons = counts["train"], counts[EVAL], _reasons(counts)
    kept = f"{train} train and {held_out} eval rows" if train or held_out else "no train or eval row"
    parts = [f"{kept} from {name}"]
    if left := sum(n for what, n in counts.items() if what.startswith(LEFT)):
        parts.append(f"left to other phases {left}")
    if reasons:
        why = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common())
        parts.append(f"dropped {reasons.total()}: {why}")
    return "; ".join(parts)


def _no_row(split: str, phase: str, counters: dict[str, Counter[str]]) -> str:
    """Return what to say where a split has no row: what became of them, and the remedy for most."""
    total = sum(counters.values(), Counter[str]())
    reasons = _reasons(total)
    if reasons.total() <= total["train"] + total[EVAL]:
        share = "data.eval_share" if split == EVAL else f"data.shares.{phase}"
        remedy = f"bring more rows, or raise {share}"
    elif max(reasons, key=reasons.__getitem__).startswith(TOO_LONG):
        remedy = f"raise {'max_prompt_tokens' if phase == 'rlhf' else 'max_tokens'}"
    else:
        remedy = "correct the rows, or what `columns` says of them"
    became = "; ".join(_what_became(name, counts) for name, counts in counters.items())
    return f"no {split} row is left for phase {phase} ({became}): {remedy}"


def _mine(
    name: str, path: Path, config: dict[str, Any], card: dict[str, Any], special: re.Pattern[str]
) -> Iterator[tuple[str, Prompt]]:
    """Yield (split, row) of the rows that this phase trains on or is measured on; count the others."""
    how, counts = config["datasets"][name], card["datasets"][name]
    for raw in progress(datafiles.read(path, how["split"], name), name, unit="rows"):
        try:
            row = adapt(raw, how["columns"], config["phase"])
        except Unusable as error:
            counts[f"{DROPPED}{error}"] += 1
            continue
        except KeyError:
            raise DataError(_missing_columns(name, raw, how["columns"])) from None
        if any(special.search(text) for text in (*row.turns, *row.texts())):
            # It would be read as the end of a turn, not as what somebody wrote.
            counts[f"{DROPPED}holds a special token"] += 1
            continue
        card["unread_turns"][name] += has_turns(row.turns[0])
        phase = phase_of(row.group, config["shares"], config["eval_share"])
        if phase in (EVAL, config["phase"]):
            yield EVAL if phase == EVAL else "train", row
        else:
            counts[f"{LEFT}{phase}"] += 1


def _missing_columns(name: str, raw: dict[str, Any], columns: dict[str, Any]) -> str:
    """Say which columns a dataset lacks, which it has, and which were perhaps meant."""
    wanted = [column for column in columns.values() if isinstance(column, str) and column not in raw]
    close = {column: difflib.get_close_matches(column, raw, n=1) for column in wanted}
    told = ", ".join(f"{c!r}" + (f" (did you mean {m[0]}?)" if m else "") for c, m in close.items())
    return f"{name} has no column named {told}; it has {', '.join(raw)}: correct `columns` of the dataset"


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
