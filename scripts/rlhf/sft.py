"""Step 1: supervised fine-tuning on responses. Loss on the response and its EOS alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rlhf.metrics import Values
from rlhf.models import masked_logprobs
from rlhf.supervised import Batch, Task, on_device
from rlhf.tokens import pad, response_labels


def task(pad_id: int) -> Task:
    """Return what step 1 learns."""
    return Task(
        _tokens, partial(_loss, pad_id=pad_id), ("loss", "tokens"), partial(_measure, pad_id=pad_id), _figures
    )


def _tokens(rows: Batch) -> int:
    return sum(len(response) for _, response in rows)


def _loss(model: Any, rows: Batch, pad_id: int) -> Tensor:
    """Return the summed negative log-likelihood of the responses' tokens."""
    batch = on_device(pad([np.concatenate(row) for row in rows], pad_id, side="right"))
    labels = response_labels([len(prompt) for prompt, _ in rows], batch)
    return -masked_logprobs(model, batch, labels).sum()


def _measure(model: Any, rows: Batch, pad_id: int) -> Values:
    return {"loss": _loss(model, rows, pad_id).item(), "tokens": _tokens(rows)}


def _figures(sums: Values) -> Values:
    loss = sums["loss"] / sums["tokens"]
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
