"""The reward stage: a reward model from preference pairs, which scores the last real token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import parallel
from rlhf.data.tokens import Packed, Padded, arrange
from rlhf.models.outputs import scores
from rlhf.training.metrics import Metrics
from rlhf.training.supervised import Batch, Task

SUMS = ("accuracy", "loss", "margin", "pairs")


def task(pad_id: int, pack_width: int | None = None) -> Task:
    """Return what the reward stage learns, from pairs packed to `pack_width` tokens, or padded without it."""
    arranged = partial(_arranged, pad_id=pad_id, pack_width=pack_width)
    return Task("reward model", len, arranged, _loss, SUMS, _measure, _figures, pack_width)


def _arranged(rows: Batch, pad_id: int, pack_width: int | None) -> Padded | Packed:
    """Return pairs as a batch: each prompt with its chosen response, then with its rejected one."""
    pairs = [[np.concatenate([prompt, response]) for response in responses] for prompt, *responses in rows]
    return arrange(pairs, pad_id, pack_width)


def _pair_scores(model: Any, batch: Padded | Packed) -> tuple[Tensor, Tensor]:
    """Return scores of the chosen and of the rejected responses, (B,) float32 each, of B pairs."""
    chosen, rejected = scores(model, batch.to(parallel.device())).view(-1, 2).unbind(1)
    return chosen, rejected


def _loss(model: Any, batch: Padded | Packed) -> Tensor:
    """Return the sum of -log sigmoid(chosen - rejected), a float32 scalar.

    Source: Ouyang et al. 2022, eq. 1.
    """
    chosen, rejected = _pair_scores(model, batch)
    return -F.logsigmoid(chosen - rejected).sum()


def _measure(model: Any, batch: Padded | Packed) -> Metrics:
    chosen, rejected = _pair_scores(model, batch)
    margins = chosen - rejected
    found = (margins > 0, -F.logsigmoid(margins), margins, torch.ones_like(margins))
    return {name: float(x.double().sum()) for name, x in zip(SUMS, found, strict=True)}


def _figures(sums: Metrics) -> Metrics:
    return {f"eval_{name}": sums[name] / sums["pairs"] for name in SUMS[:3]}
