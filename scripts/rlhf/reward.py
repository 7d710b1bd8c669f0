"""Step 2: a reward model on preference pairs, scored at the last real token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.metrics import Values
from rlhf.models import scores
from rlhf.supervised import Batch, Task, on_device
from rlhf.tokens import pad

SUMS = ("accuracy", "loss", "margin", "pairs")


def task(pad_id: int) -> Task:
    """Return what step 2 learns."""
    return Task(len, partial(_loss, pad_id=pad_id), SUMS, partial(_measure, pad_id=pad_id), _figures)


def _pair_scores(model: Any, rows: Batch, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return scores (B,) of the chosen and (B,) of the rejected responses."""
    chosen = [np.concatenate([prompt, better]) for prompt, better, _ in rows]
    rejected = [np.concatenate([prompt, worse]) for prompt, _, worse in rows]
    batch = on_device(pad(chosen + rejected, pad_id, side="right"))
    first, second = scores(model, batch).chunk(2)
    return first, second


def _loss(model: Any, rows: Batch, pad_id: int) -> Tensor:
    """Return the summed -log sigmoid(chosen - rejected). Source: Ouyang et al. 2022, eq. 1."""
    chosen, rejected = _pair_scores(model, rows, pad_id)
    return -F.logsigmoid(chosen - rejected).sum()


def _measure(model: Any, rows: Batch, pad_id: int) -> Values:
    chosen, rejected = _pair_scores(model, rows, pad_id)
    margins = chosen - rejected
    found = (margins > 0, -F.logsigmoid(margins), margins, torch.ones_like(margins))
    return {name: float(x.double().sum()) for name, x in zip(SUMS, found, strict=True)}


def _figures(sums: Values) -> Values:
    return {f"eval_{name}": sums[name] / sums["pairs"] for name in SUMS[:3]}
