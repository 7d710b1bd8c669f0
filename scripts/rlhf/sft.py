"""Step 1: supervised fine-tuning on responses. Loss on the response and its EOS alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.metrics import Values
from rlhf.models import response_logprobs
from rlhf.supervised import Batch, Task, on_device
from rlhf.tokens import arrange, response_labels


def task(pad_id: int, pack_width: int | None = None) -> Task:
    """Return what step 1 learns, from rows packed to `pack_width` tokens, or padded without it."""
    options = {"pad_id": pad_id, "pack_width": pack_width}
    return Task(
        "step 1, SFT",
        _tokens,
        partial(_loss, **options),
        ("loss", "tokens"),
        partial(_measure, **options),
        _figures,
        pack_width,
    )


def _tokens(rows: Batch) -> int:
    return sum(len(response) for _, response in rows)


def _loss(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> Tensor:
    """Return the summed negative log-likelihood of the responses' tokens."""
    batch = on_device(arrange([[np.concatenate(row)] for row in rows], pad_id, pack_width))
    labels = response_labels([len(prompt) for prompt, _ in rows], batch)
    return -response_logprobs(model, batch, labels).sum()


def _measure(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> Values:
    return {"loss": _loss(model, rows, pad_id, pack_width).item(), "tokens": _tokens(rows)}


def _figures(sums: Values) -> Values:
    loss = sums["loss"] / sums["tokens"]
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
