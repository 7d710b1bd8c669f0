"""From a dataset's rows to tokenised splits: adapt, assign to a stage, render, tokenise, drop and count."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.config.sources import Dataset
from rlhf.config.stages import Preparation, Stage
from rlhf.data import readers
from rlhf.data.adapters import Prompt, Unusable, adapt, has_turns
from rlhf.data.rows import PARTS, Rows, RowWriter
from rlhf.data.splits import stage_of
from rlhf.data.templates import load_tokenizer, prompt_texts, response_texts
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.progress import progress
from rlhf.store.layout import CARD, EVAL, TRAIN

logger = logging.getLogger(__name__)

CHUNK = 1000  # rows per call of the tokenizer
DROPPED, LEFT = "dropped: ", "left to "  # beginnings of names in the card, before a reason or a stage
TOO_LONG = "longer than"
FEW_GROUPS = 20  # with fewer, a split without a row is no matter of chance


def prepare(config: Preparation, tokenizer_path: Path, datasets: dict[str, Path], out: Path) -> None:
    """Write the splits `train` and `eval` of a stage, and `card.json`.

    Args:
        config: which rows to read, and how to divide them.
        tokenizer_path: the model whose tokenizer is used.
        datasets: name -> path of its artefact.
        out: directory of the new artefact.

    Raises:
        DataError: a dataset cannot be read, or a split has no row.
    """
    tokenizer, parts = load_tokenizer(tokenizer_path), PARTS[config.stage]
    counters = {name: Counter[str]() for name in datasets}
    # Dataset -> prompts that contain turns but are read as one turn.
    unread_turns: Counter[str] = Counter()
    groups = set[str]()
    card: dict[str, Any] = {"stage": config.stage, "parts": list(parts), "datasets": counters, "splits": {}}
    card["unread_turns"] = unread_turns
    with RowWriter(out / TRAIN, parts) as train, RowWriter(out / EVAL, parts) as held_out:
        for name, path in datasets.items():
            rows = _rows_of_stage(
                _Dataset(name, path, config, counters[name], unread_turns, groups), tokenizer
            )
            for split, tokens in _tokenised(rows, tokenizer):
                # The prompt with the longer response.
                if sum(map(len, tokens[:1])) + max(map(len, tokens[1:]), default=0) > config.max_tokens:
                    counters[name][f"{DROPPED}{TOO_LONG} {config.max_tokens} tokens"] += 1
                    continue
                (held_out if split == EVAL else train).append(tokens)
                counters[name][split] += 1
            _log_counts(name, counters[name], unread_turns[name])
    for split in (TRAIN, EVAL):
        card["splits"][split] = _statistics(Rows(out / split), parts)
        if not card["splits"][split]["rows"]:
            raise DataError(_no_rows(split, config.stage, counters, len(groups)))
    write_json(out / CARD, card)


@dataclass(frozen=True)
class _Dataset:
    """A dataset that is being read, and its counters."""

    name: str
    path: Path
    config: Preparation
    counts: Counter[str]
    unread_turns: Counter[str]
    groups: set[str]  # of all datasets; at most `FEW_GROUPS` are kept


def _rows_of_stage(dataset: _Dataset, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, Prompt]]:
    """Yield (split, row) of the rows that this stage trains on or is evaluated on; count the others."""
    config, counts = dataset.config, dataset.counts
    source, shares = config.datasets[dataset.name], config.shares.model_dump()
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    for raw in progress(_read(dataset.path, source), dataset.name, unit="rows"):
        try:
            row = adapt(raw, source.columns, config.stage)
        except Unusable as error:
            counts[f"{DROPPED}{error}"] += 1
            continue
        if any(special.search(text) for text in (*row.turns, *row.texts())):
            # The tokenizer would encode it as the end of a turn, not as text.
            counts[f"{DROPPED}holds a special token"] += 1
            continue
        dataset.unread_turns[dataset.name] += has_turns(row.turns[0])
        if len(dataset.groups) < FEW_GROUPS:
            dataset.groups.add(row.group)
        stage = stage_of(row.group, shares, config.eval_share)
        if stage in (EVAL, config.stage):
            yield EVAL if stage == EVAL else TRAIN, row
        else:
            counts[f"{LEFT}{stage}"] += 1


def _read(path: Path, source: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset.

    Raises:
        DataError: it cannot be read, or lacks a column; the text says which it has, and which may be meant.
    """
    try:
        yield from readers.read(path, source)
    except readers.MissingColumns as error:
        missing = [column for column in source.columns.names if column not in error.present]
        close = {column: difflib.get_close_matches(column, error.present, n=1) for column in missing}
        listed = ", ".join(f"{c!r}" + (f" (did you mean {m[0]}?)" if m else "") for c, m in close.items())
        raise DataError(
            f"{source.name} has no column named {listed}; it has {', '.join(error.present)}: correct `columns` of the"
            " dataset"
        ) from None


def _log_counts(name: str, counts: Counter[str], unread_turns: int) -> None:
    """Log how many rows of a dataset are used, and warn if that looks wrong."""
    level = logging.WARNING if _kept_share(counts) < 0.5 else logging.INFO
    logger.log(level, "%s", _summary(name, counts))
    if unread_turns:
        logger.warning(
            "%s: %d prompts contain Human: and Assistant: turns, but each is read as one turn of the user; if"
            " they are dialogues, set columns.dialogue: true",
            name,
            unread_turns,
        )


def _reasons(counts: Counter[str]) -> Counter[str]:
    """Return the number of dropped rows by reason."""
    return Counter({k.removeprefix(DROPPED): n for k, n in counts.items() if k.startswith(DROPPED)})


def _kept_share(counts: Counter[str]) -> float:
    """Return the share of a stage's rows that it keeps.

    Unusable rows are dropped before their stage is known, rows that are too long afterwards. So this is
    the share of rows that are usable, times the share of this stage's rows that are short enough.
    """
    kept = counts[TRAIN] + counts[EVAL]
    reasons = _reasons(counts)
    too_long = sum(n for reason, n in reasons.items() if reason.startswith(TOO_LONG))
    usable = counts.total() - (reasons.total() - too_long)
    return kept / max(1, kept + too_long) * usable / max(1, counts.total())


def _summary(name: str, counts: Counter[str]) -> str:
    """Say how many rows of a dataset are kept, belong to other stages, and are dropped for which reasons."""
    train, held_out, reasons = counts[TRAIN], counts[EVAL], _reasons(counts)
    kept = f"{train} train and {held_out} eval rows" if train or held_out else "no train or eval row"
    clauses = [f"{kept} from {name}"]
    if other_stages := sum(n for what, n in counts.items() if what.startswith(LEFT)):
        clauses.append(f"left to other stages {other_stages}")
    if reasons:
        listed = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common())
        clauses.append(f"dropped {reasons.total()}: {listed}")
    return "; ".join(clauses)


def _no_rows(split: str, stage: Stage, counters: dict[str, Counter[str]], groups: int) -> str:
    """Say that a split has no row, how all rows were used, and what helps against the main cause."""
    total = sum(counters.values(), Counter[str]())
    reasons = _reasons(total)
    if reasons.total() <= total[TRAIN] + total[EVAL]:
        share = "data.eval_share" if split == EVAL else f"data.shares.{stage}"
        remedy = f"add rows, or raise {share}"
        if groups < FEW_GROUPS and total.total() > groups:
            remedy = (
                f"all rows are in {'one group' if groups == 1 else f'{groups} groups'}, and a group is in one split; without"
                " `columns.group` rows with the same first turn are a group: name a column there that differs"
                " between conversations"
            )
    elif max(reasons, key=reasons.__getitem__).startswith(TOO_LONG):
        remedy = f"raise {'max_prompt_tokens' if stage == 'rlhf' else 'max_tokens'}"
    else:
        remedy = "correct the rows, or `columns` of the dataset"
    summaries = "; ".join(_summary(name, counts) for name, counts in counters.items())
    return f"no {split} row is left for stage {stage} ({summaries}): {remedy}"


def _tokenised(
    rows: Iterable[tuple[str, Prompt]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield (split, token ids of each part); one call of the tokenizer covers many rows."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        prompts = [row.turns for _, row in chunk]
        texts = prompt_texts(tokenizer, prompts)
        columns = [texts]  # the texts of each part
        for responses in zip(*(row.texts() for _, row in chunk), strict=True):
            columns.append(response_texts(tokenizer, prompts, texts, responses))
        ids = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in columns]
        for (split, _), *parts in zip(chunk, *ids, strict=True):
            yield split, parts


def _statistics(rows: Rows, parts: Sequence[str]) -> dict[str, Any]:
    """Return a split's number of rows and tokens, and the mean and longest length of each part in tokens."""
    lengths = rows.tokens_per_part  # (N, parts)
    if not len(lengths):
        return {"rows": 0, "tokens": 0}
    by_part = {
        part: {"mean": round(float(column.mean()), 2), "longest": int(column.max())}
        for part, column in zip(parts, lengths.T, strict=True)
    }
    return {"rows": len(rows), "tokens": int(lengths.sum()), **by_part}
