"""The SFT stage: supervised fine-tuning. The loss is on responses and their EOS only."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.data.tokens import arrange, response_labels
from rlhf.models.outputs import response_logprobs
from rlhf.training.metrics import Metrics
from rlhf.training.supervised import Batch, Task, on_device


def task(pad_id: int, pack_width: int | None = None) -> Task:
    """Return what the SFT stage learns, from rows packed to `pack_width` tokens, or padded without it."""
    options: dict[str, Any] = {"pad_id": pad_id, "pack_width": pack_width}
    return Task(
        "SFT",
        response_tokens,
        partial(loss, **options),
        ("loss", "tokens"),
        partial(_measure, **options),
        _figures,
        pack_width,
    )


def response_tokens(rows: Batch) -> int:
    """Return the number of response tokens, EOS included."""
    return sum(len(response) for _, response in rows)


def loss(model: Any, rows: Batch, pad_id: int, pack_width: int | None = None) -> Tensor:
    """Return the sum of the negative log-likelihoods of the responses' tokens, a float32 scalar."""
    batch = on_device(arrange([[np.concatenate(row)] for row in rows], pad_id, pack_width))
    labels = response_labels([len(prompt) for prompt, _ in rows], batch)
    return -response_logprobs(model, batch, labels).sum()


def _measure(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> Metrics:
    return {"loss": loss(model, rows, pad_id, pack_width).item(), "tokens": response_tokens(rows)}


def _figures(sums: Metrics) -> Metrics:
    mean = sums["loss"] / sums["tokens"]
    return {"eval_loss": mean, "eval_perplexity": math.exp(mean)}
