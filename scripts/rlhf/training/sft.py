"""The SFT stage: supervised fine-tuning. The loss is on responses and their EOS only."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rlhf import parallel
from rlhf.data.tokens import Packed, Padded, arrange, response_labels
from rlhf.models.outputs import response_logprobs
from rlhf.training.metrics import Metrics
from rlhf.training.supervised import Batch, Task


def task(pad_id: int, pack_width: int | None = None) -> Task:
    """Return what the SFT stage learns, from rows packed to `pack_width` tokens, or padded without it."""
    arranged = partial(_arranged, pad_id=pad_id, pack_width=pack_width)
    return Task("SFT", response_tokens, arranged, _loss, ("loss", "tokens"), _measure, _figures, pack_width)


def response_tokens(rows: Batch) -> int:
    """Return the number of response tokens, EOS included."""
    return sum(len(response) for _, response in rows)


def _arranged(rows: Batch, pad_id: int, pack_width: int | None) -> tuple[Padded | Packed, Tensor]:
    """Return rows as a batch, and its labels: bool, True at the responses' tokens."""
    batch = arrange([[np.concatenate(row)] for row in rows], pad_id, pack_width)
    return batch, response_labels([len(prompt) for prompt, _ in rows], batch)


def _loss(model: Any, arranged: tuple[Padded | Packed, Tensor]) -> Tensor:
    """Return the sum of the negative log-likelihoods of the responses' tokens, a float32 scalar."""
    batch, labels = arranged
    device = parallel.device()
    return -response_logprobs(model, batch.to(device), labels.to(device)).sum()


def _measure(model: Any, arranged: tuple[Padded | Packed, Tensor]) -> Metrics:
    return {"loss": _loss(model, arranged).item(), "tokens": int(arranged[1].sum())}


def _figures(sums: Metrics) -> Metrics:
    mean = sums["loss"] / sums["tokens"]
    return {"eval_loss": mean, "eval_perplexity": math.exp(mean)}
