"""Replies before (SFT) and after (RLHF) on held-out prompts, and figures that sum them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from rlhf import models
from rlhf.config import Eval
from rlhf.generation import Generated, Sampling
from rlhf.judges import JUDGES
from rlhf.rollout import EVALUATION, micro_batches, reply
from rlhf.rows import Rows

BATCH = 64
SHOWN = 12  # prompts in the table


def compare(
    actor: Any, reference: Any, reward: Any, tokenizer: PreTrainedTokenizerFast, data: Path, config: Eval
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return one row per prompt, and the summary. Both models get the same noise."""
    prompts = Rows(data / "eval")
    chosen = [prompts[i][0] for i in range(min(config.prompts, len(prompts)))]
    judge = JUDGES[config.judge] if config.judge else None
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    rows: list[dict[str, Any]] = [{"prompt": tokenizer.decode(p, skip_special_tokens=True)} for p in chosen]
    for when, model in (("before", reference), ("after", actor)):
        for part in micro_batches(len(chosen), BATCH):
            numbers = range(len(chosen))[part]
            made = reply(model, chosen[part], sampling, config.seed, EVALUATION, numbers)
            texts = tokenizer.batch_decode(made.responses, skip_special_tokens=True)
            scored = _scores(reward, made)
            kl = _kl(model, reference, made, config.temperature or 1.0)
            for row, text, score, nats in zip(rows[part], texts, scored, kl, strict=True):
                row[when] = {"reply": text, "score": score, "kl": nats, "words": len(text.split())}
                if judge:
                    row[when]["judged"] = judge(text)
    return rows, summary(rows)


def _scores(reward: Any, made: Generated) -> list[float]:
    with torch.no_grad():
        return [float(s) for s in models.scores(reward, made.batch)]


def _kl(model: Any, reference: Any, made: Generated, temperature: float) -> list[float]:
    """Return log pi - log ref of each reply, summed over its tokens (nats)."""
    length = made.response_mask.shape[1]
    with models.evaluating(model):
        both = [
            models.token_logprobs(models.response_logits(m, made.batch, length, temperature), made.responses)
            for m in (model, reference)
        ]
    return [float(x) for x in ((both[0] - both[1]) * made.response_mask).sum(-1)]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of a comparison, `_before` and `_after`."""
    figures: dict[str, float] = {"prompts": len(rows), "kl": _mean([r["after"]["kl"] for r in rows])}
    for when in ("before", "after"):
        replies = [row[when] for row in rows]
        figures[f"score_{when}"] = _mean([r["score"] for r in replies])
        figures[f"words_{when}"] = _mean([r["words"] for r in replies])
        figures[f"distinct_2_{when}"] = distinct_bigrams([r["reply"] for r in replies])
        if "judged" in replies[0]:
            figures[f"judged_{when}"] = _mean([r["judged"] for r in replies])
    if "judged_after" in figures:
        figures["judged_after_matched_length"] = matched_length(rows)
    return {name: round(value, 4) for name, value in figures.items()}


def matched_length(rows: Sequence[dict[str, Any]]) -> float:
    """Return the mean judgement after, replies weighted to the word counts of those before.

    A judge that adds up over words likes long replies; this takes that part out. Word counts that
    only the replies before have are left out.
    """
    wanted = Counter(row["before"]["words"] for row in rows)
    by_words: dict[int, list[float]] = {}
    for row in rows:
        by_words.setdefault(row["after"]["words"], []).append(row["after"]["judged"])
    common = wanted.keys() & by_words.keys()
    weight = sum(wanted[n] for n in common)
    return sum(wanted[n] * _mean(by_words[n]) for n in common) / weight if weight else float("nan")


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Return different bigrams over all bigrams of words, of all texts together."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / max(1, len(bigrams))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def table(rows: Sequence[dict[str, Any]], figures: dict[str, float]) -> str:
    """Return prompts with the reply before and after, and the figures, as text."""
    lines = []
    for row in rows[:SHOWN]:
        lines.append(f"prompt  {row['prompt']}")
        for when in ("before", "after"):
            r = row[when]
            judged = f"  judged {r['judged']:+.2f}" if "judged" in r else ""
            lines.append(f"{when:<7} score {r['score']:+.2f}{judged}  {r['reply']}")
        lines.append("")
    lines.append(f"{figures['prompts']:.0f} held-out prompts   before    after")
    names = [n.removesuffix("_after") for n in figures if n.endswith("_after")]
    for name in names:
        before, after = figures[f"{name}_before"], figures[f"{name}_after"]
        lines.append(f"{name:<22} {before:+9.3f} {after:+9.3f}")
    if "judged_after_matched_length" in figures:
        matched = figures["judged_after_matched_length"]
        lines.append(f"{'judged, matched length':<22} {'':>9} {matched:+9.3f}")
    lines.append(f"{'KL to the SFT actor':<22} {'':>9} {figures['kl']:9.3f} nats per reply")
    return "\n".join(lines) + "\n"
