"""Responses before (SFT) and after (RLHF) on held-out prompts, and figures that sum them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from rlhf import parallel
from rlhf.config.stages import Eval
from rlhf.config.training import RlhfRun
from rlhf.data.rows import Rows
from rlhf.data.streams import Purpose, Stream
from rlhf.evaluation.judges import JUDGES
from rlhf.generation.distributed import sample
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Generated, Sampling
from rlhf.models import outputs
from rlhf.store.layout import EVAL
from rlhf.terminal import printable
from rlhf.training import fit
from rlhf.training.rollout import by_length, compacted, scatter
from rlhf.training.wrapped import unwrap

Figures = dict[str, float | None]  # None: a mean over nothing
SHOWN = 5  # prompts in the table


@dataclass(frozen=True)
class Models:
    """The models of a comparison: engines or `engine.SingleForward`s."""

    actor: Any  # after RLHF
    reference: Any  # before it: the SFT actor
    reward: Any
    tokenizer: PreTrainedTokenizerFast


def compare(models: Models, data: Path, config: Eval, run: RlhfRun) -> tuple[list[dict[str, Any]], Figures]:
    """Return one row per prompt, and the summary, in every process. Both actors get the same noise.

    Each process samples responses to a part of the prompts. The last prompt is repeated, and not counted, until all
    parts have the same size.

    Args:
        data: tokenised rows of the PPO stage.
    """
    held_out, processes = Rows(data / EVAL), parallel.world_size()
    count = min(config.prompts, len(held_out))
    prompts = [held_out[min(i, count - 1)][0] for i in range(math.ceil(count / processes) * processes)]
    unwrapped = [unwrap(model) for model in (models.actor, models.reference, models.reward)]
    run = fit.fitted_comparison(unwrapped, config, run, max(map(len, prompts)))
    decode = models.tokenizer.decode
    rows: list[dict[str, Any]] = [{"prompt": decode(p, skip_special_tokens=True)} for p in prompts[:count]]
    for when, actor in (("before", models.reference), ("after", models.actor)):
        generated = _sampled(actor, prompts, models.tokenizer, config, run)
        mine = [row for part in generated for row in _described(part, actor, models, config, run)]
        for row, described in zip(rows, parallel.all_gather_objects(mine)[:count], strict=True):
            row[when] = described
    return rows, summary(rows)


def _sampled(
    actor: Any, prompts: Sequence[Any], tokenizer: PreTrainedTokenizerFast, config: Eval, run: RlhfRun
) -> list[Generated]:
    """Return this process's share of an actor's responses."""
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = Sampling(config.max_new_tokens, config.temperature, eos_id, pad_id)
    stream = Stream(config.seed, Purpose.EVALUATION)
    sampler = Sampler(unwrap(actor), sampling, parallel.group(run.inference_tp_size))
    sampler.refresh()
    return sample(sampler, prompts, stream, run)


def _described(
    generated: Generated, actor: Any, models: Models, config: Eval, run: RlhfRun
) -> list[dict[str, Any]]:
    """Return text, score, KL and words of each response, and the judge's score; read in micro-batches."""
    mask, temperature = generated.response_mask, config.temperature or 1.0
    scored, kl = (torch.zeros(len(mask), device=mask.device) for _ in range(2))  # (B,); KL in nats
    everything = torch.arange(len(mask), device=mask.device)
    with torch.no_grad():
        for rows in by_length(generated.batch, everything, run.micro_rows):
            batch, labels = compacted(generated.batch, mask, rows)
            scored[rows] = models.reward(outputs.scores, batch)
            own, theirs = (
                m(outputs.response_logprobs, batch, labels, temperature) for m in (actor, models.reference)
            )  # (N,)
            kl[rows] = scatter(own - theirs, mask[rows]).sum(-1)
    texts = models.tokenizer.batch_decode(generated.responses, skip_special_tokens=True)
    described = [
        {"response": text, "score": score, "kl": nats, "words": len(text.split())}
        for text, score, nats in zip(texts, scored.tolist(), kl.tolist(), strict=True)
    ]
    judge = JUDGES[config.judge] if config.judge else None
    return [{**row, "judged": judge(row["response"])} for row in described] if judge else described


def summary(rows: Sequence[dict[str, Any]]) -> Figures:
    """Return the figures of a comparison, `_before` and `_after`."""
    figures: Figures = {"prompts": len(rows), "kl": _mean([r["after"]["kl"] for r in rows])}
    for when in ("before", "after"):
        responses = [row[when] for row in rows]
        figures[f"score_{when}"] = _mean([r["score"] for r in responses])
        figures[f"words_{when}"] = _mean([r["words"] for r in responses])
        figures[f"distinct_2_{when}"] = distinct_bigrams([r["response"] for r in responses])
        if "judged" in responses[0]:
            figures[f"judged_{when}"] = _mean([r["judged"] for r in responses])
    figures["win_rate_score"] = win_rate(rows, "score")
    if "judged_after" in figures:
        figures["win_rate_judged"] = win_rate(rows, "judged")
        figures |= matched_length(rows)
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}


def win_rate(rows: Sequence[dict[str, Any]], by: str) -> float:
    """Return the share of prompts whose response after is the better one; a tie counts half."""
    gaps = np.array([row["after"][by] - row["before"][by] for row in rows])
    return float(np.mean((gaps > 0) + (gaps == 0) / 2))


def matched_length(rows: Sequence[dict[str, Any]]) -> Figures:
    """Return mean judgements over the word counts that responses before and after have in common.

    A judge that adds up over words prefers long responses. This removes that part: responses after are
    weighted to the word counts before. Other word counts are left out of both means; `in_common` is the
    share of responses that remain. Means over nothing are None.
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
    """Return distinct bigrams of words over all bigrams, of all texts together."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / max(1, len(bigrams))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def table(rows: Sequence[dict[str, Any]], figures: Figures) -> str:
    """Return some prompts with both responses, what the figures mean, and the figures, as text."""
    lines = []
    for row in rows[:SHOWN]:
        lines.append(f"prompt  {printable(row['prompt'])}")
        for when in ("before", "after"):
            r = row[when]
            judged = f"  judged {r['judged']:+.2f}" if "judged" in r else ""
            lines.append(f"{when:<7} score {r['score']:+.2f}{judged}  {printable(r['response'])}")
        lines.append("")
    return "\n".join([*lines, *conclusions(figures), "", *_figure_lines(figures), ""])


def _figure_lines(figures: Figures) -> list[str]:
    """Return one line per figure, before and after beside each other."""
    lines = [f"{figures['prompts']:.0f} held-out prompts   before    after"]
    for name in (n.removesuffix("_after") for n in figures if n.endswith("_after")):
        sign = "+" if name.startswith(("score", "judged")) else ""
        values = [figures[f"{name}_{when}"] for when in ("before", "after")]
        before, after = ("-" if value is None else f"{value:{sign}.3f}" for value in values)
        lines.append(f"{name:<22} {before:>9} {after:>9}")
    for name in (n for n in figures if n.startswith("win_rate")):
        by = name.removeprefix("win_rate_")
        lines.append(f"{'win rate, ' + by:<22} {'':>9} {figures[name]:9.1%}")
    return [*lines, f"{'KL to the SFT actor':<22} {'':>9} {figures['kl']:9.3f} nats per response"]


def conclusions(figures: Figures) -> list[str]:
    """Return what the figures mean, in three plain sentences."""
    judge, what = (
        ("judged", "sentiment of responses (VADER, -1 to 1)")
        if "judged_after" in figures
        else ("score", "score of responses by the reward model")
    )
    return [
        f"RLHF moved the mean {what} from {figures[f'{judge}_before']:+.2f} to {figures[f'{judge}_after']:+.2f}.",
        f"The reward model prefers the response after RLHF for {figures['win_rate_score']:.0%} of"
        f" {figures['prompts']:.0f} held-out prompts.",
        f"Responses have {figures['words_after']:.1f} words (before: {figures['words_before']:.1f}); the actor"
        f" moved {figures['kl']:.1f} nats per response away from the SFT model.",
    ]
