"""Replies before (SFT) and after (RLHF) on held-out prompts, and figures that sum them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from rlhf import models, parallel
from rlhf.config import Eval, RlhfRun
from rlhf.engine import bare
from rlhf.generation import Generated, Sampling
from rlhf.judges import JUDGES
from rlhf.rollout import as_read, by_length, sample, spread
from rlhf.rows import Rows
from rlhf.sharding import generator
from rlhf.streams import Purpose
from rlhf.terminal import printable

Figures = dict[str, float | None]  # None: a mean over nothing
SHOWN = 12  # prompts in the table
LEGEND = """\
before: SFT; after: RLHF. score: the reward model's; judged: by the judge of the configuration (VADER's
compound is -1 to 1). words: of a reply; distinct_2: different bigrams over all bigrams. matched_length: over the
word counts that both have, replies after weighted to those before; in_common: the share of such replies.
win rate: share of prompts whose reply after is the better one, equal ones count half.
KL: log pi - log SFT, summed over a reply's tokens.
"""


def compare(
    actor: Any, reference: Any, reward: Any, tokenizer: PreTrainedTokenizerFast, data: Path, config: Eval,
    run: RlhfRun,
) -> tuple[list[dict[str, Any]], Figures]:  # fmt: skip
    """Return one row per prompt, and the summary, in every process. Both models get the same noise.

    The models are engines or `engine.Root`s. Each process answers a part of the prompts; the last prompt
    is answered again, and not counted, until all parts are equal.
    """
    prompts, processes = Rows(data / "eval"), parallel.world_size()
    count = min(config.prompts, len(prompts))
    asked = [prompts[min(i, count - 1)][0] for i in range(math.ceil(count / processes) * processes)]
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    rows: list[dict[str, Any]] = [
        {"prompt": tokenizer.decode(p, skip_special_tokens=True)} for p in asked[:count]
    ]
    for when, model in (("before", reference), ("after", actor)):
        copy = generator(bare(model), parallel.group(run.inference_tp_size))
        made = list(sample(copy, asked, sampling, config.seed, Purpose.EVALUATION, 0, run))
        del copy
        mine = [
            row
            for part in made
            for row in _looked_at(part, model, reference, reward, tokenizer, config, run.micro_batch_size)
        ]
        for row, seen in zip(rows, parallel.gathered(mine)[:count], strict=True):
            row[when] = seen
    return rows, summary(rows)


def _looked_at(
    made: Generated, model: Any, reference: Any, reward: Any, tokenizer: PreTrainedTokenizerFast, config: Eval,
    micro_batch_size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return what there is to say of each reply of `model`; models read a micro-batch at a time, as in step 3."""
    mask, temperature = made.response_mask, config.temperature or 1.0
    scored, kl = (torch.zeros(len(mask), device=mask.device) for _ in range(2))  # kl: log pi - log ref, nats
    with torch.no_grad():
        for part in by_length(made.batch, torch.arange(len(mask), device=mask.device), micro_batch_size):
            batch, replies = as_read(made.batch, mask, part)
            scored[part] = reward(models.scores, batch)
            own, theirs = (
                m(models.response_logprobs, batch, replies, temperature) for m in (model, reference)
            )
            kl[part] = spread(own - theirs, mask[part]).sum(-1)
    texts = tokenizer.batch_decode(made.responses, skip_special_tokens=True)
    rows = [
        {"reply": text, "score": score, "kl": nats, "words": len(text.split())}
        for text, score, nats in zip(texts, scored.tolist(), kl.tolist(), strict=True)
    ]
    judge = JUDGES[config.judge] if config.judge else None
    return [{**row, "judged": judge(row["reply"])} for row in rows] if judge else rows


def summary(rows: Sequence[dict[str, Any]]) -> Figures:
    """Return the figures of a comparison, `_before` and `_after`."""
    figures: Figures = {"prompts": len(rows), "kl": _mean([r["after"]["kl"] for r in rows])}
    for when in ("before", "after"):
        replies = [row[when] for row in rows]
        figures[f"score_{when}"] = _mean([r["score"] for r in replies])
        figures[f"words_{when}"] = _mean([r["words"] for r in replies])
        figures[f"distinct_2_{when}"] = distinct_bigrams([r["reply"] for r in replies])
        if "judged" in replies[0]:
            figures[f"judged_{when}"] = _mean([r["judged"] for r in replies])
    figures["win_rate_score"] = win_rate(rows, "score")
    if "judged_after" in figures:
        figures["win_rate_judged"] = win_rate(rows, "judged")
        figures |= matched_length(rows)
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}


def win_rate(rows: Sequence[dict[str, Any]], by: str) -> float:
    """Return the share of prompts whose reply after is the better one; an equal one counts half."""
    gaps = np.array([row["after"][by] - row["before"][by] for row in rows])
    return float(np.mean((gaps > 0) + (gaps == 0) / 2))


def matched_length(rows: Sequence[dict[str, Any]]) -> Figures:
    """Return mean judgements over the word counts that replies before and after have in common.

    A judge that adds up over words likes long replies; this takes that part out: replies after are weighted
    to the word counts before. Other word counts are left out of both means; `in_common` is the share of
    replies that is not. Means over nothing are None.
    """
    judged: dict[str, dict[int, list[float]]] = {"before": {}, "after": {}}
    for when, of in judged.items():
        for row in rows:
            of.setdefault(row[when]["words"], []).append(row[when]["judged"])
    common = judged["before"].keys() & judged["after"].keys()
    counts = {when: [len(of[n]) for n in common] for when, of in judged.items()}
    weights = np.array(counts["before"]) / max(1, sum(counts["before"]))
    figures: Figures = {}
    for when, of in judged.items():
        means = [_mean(of[n]) for n in common]
        figures[f"judged_matched_length_{when}"] = float(weights @ means) if common else None
        figures[f"in_common_{when}"] = sum(counts[when]) / len(rows)
    return figures


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Return different bigrams over all bigrams of words, of all texts together."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / max(1, len(bigrams))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def table(rows: Sequence[dict[str, Any]], figures: Figures) -> str:
    """Return prompts with the reply before and after, and the figures, as text."""
    lines = []
    for row in rows[:SHOWN]:
        lines.append(f"prompt  {printable(row['prompt'])}")
        for when in ("before", "after"):
            r = row[when]
            judged = f"  judged {r['judged']:+.2f}" if "judged" in r else ""
            lines.append(f"{when:<7} score {r['score']:+.2f}{judged}  {printable(r['reply'])}")
        lines.append("")
    lines.append(f"{figures['prompts']:.0f} held-out prompts   before    after")
    names = [n.removesuffix("_after") for n in figures if n.endswith("_after")]
    for name in names:
        sign = "+" if name.startswith(("score", "judged")) else ""
        values = [figures[f"{name}_{when}"] for when in ("before", "after")]
        before, after = ("-" if value is None else f"{value:{sign}.3f}" for value in values)
        lines.append(f"{name:<22} {before:>9} {after:>9}")
    for name in (n for n in figures if n.startswith("win_rate")):
        by = name.removeprefix("win_rate_")
        lines.append(f"{'win rate, ' + by:<22} {'':>9} {figures[name]:9.1%}")
    lines.append(f"{'KL to the SFT actor':<22} {'':>9} {figures['kl']:9.3f} nats per reply")
    return "\n".join([*lines, "", LEGEND])
