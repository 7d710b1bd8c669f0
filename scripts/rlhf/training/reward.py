"""The reward stage: a reward model from preference pairs, which scores the last real token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.tokens import arrange
from rlhf.models.outputs import scores
from rlhf.training.metrics import Metrics
from rlhf.training.supervised import Batch, Task, on_device

SUMS = ("accuracy", "loss", "margin", "pairs")


def task(pad_id: int, pack_width: int | None = None) -> Task:
    """Return what the reward stage learns, from pairs packed to `pack_width` tokens, or padded without it."""
    options: dict[str, Any] = {"pad_id": pad_id, "pack_width": pack_width}
    return Task(
        "reward model",
        len,
        partial(_loss, **options),
        SUMS,
        partial(_measure, **options),
        _figures,
        pack_width,
    )


def _pair_scores(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> tuple[Tensor, Tensor]:
    """Return scores of the chosen and of the rejected responses, (B,) float32 each, of B pairs."""
    pairs = [[np.concatenate([prompt, response]) for response in responses] for prompt, *responses in rows]
    batch = on_device(arrange(pairs, pad_id, pack_width))
    chosen, rejected = scores(model, batch).view(-1, 2).unbind(1)
    return chosen, rejected


def _loss(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> Tensor:
    """Return the sum of -log sigmoid(chosen - rejected), a float32 scalar.

    Source: Ouyang et al. 2022, eq. 1.
    """
    chosen, rejected = _pair_scores(model, rows, pad_id, pack_width)
    return -F.logsigmoid(chosen - rejected).sum()


def _measure(model: Any, rows: Batch, pad_id: int, pack_width: int | None) -> Metrics:
    chosen, rejected = _pair_scores(model, rows, pad_id, pack_width)
    margins = chosen - rejected
    found = (margins > 0, -F.logsigmoid(margins), margins, torch.ones_like(margins))
    return {name: float(x.double().sum()) for name, x in zip(SUMS, found, strict=True)}


def _figures(sums: Metrics) -> Metrics:
    return {f"eval_{name}": sums[name] / sums["pairs"] for name in SUMS[:3]}
