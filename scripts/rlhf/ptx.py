"""PTX: step 1's loss beside PPO's, so that the actor does not unlearn what it imitated.

Source: Ouyang et al. 2022, eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rlhf import order, sft
from rlhf.metrics import Values
from rlhf.parallel import own
from rlhf.rows import Rows


@dataclass(frozen=True)
class Ptx:
    """Rows of step 1, `size` of them in each of `steps` optimizer steps, in micro-batches."""

    rows: Rows
    coef: float
    pad_id: int
    seed: int
    size: int
    steps: int
    micro_batch_size: int

    def losses(self, actor: Any, step: int, metrics: list[Values]) -> Iterator[Tensor]:
        """Yield the parts of this process's micro-batches in `coef` * the mean loss per token.

        Args:
            step: optimizer steps before this one; it decides the rows.
            metrics: gets each part of `ptx_loss`, without the coefficient.
        """
        task = sft.task(self.pad_id)
        lengths = self.rows.tokens_per_row
        chosen = [self.rows[int(i)] for i in order.batch(lengths, self.size, step, self.steps, self.seed)]
        tokens = task.terms(chosen)
        for start in own(range(0, self.size, self.micro_batch_size)):
            rows = chosen[start : start + self.micro_batch_size]
            loss = actor(partial(task.loss, rows=rows)) / tokens
            metrics.append({"ptx_loss": float(loss.detach())})
            yield self.coef * loss
