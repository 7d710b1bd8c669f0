"""PTX: the SFT stage's loss beside PPO's, so that the actor does not unlearn what it imitated.

Source: Ouyang et al. 2022, eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf.data import order
from rlhf.data.rows import Rows
from rlhf.parallel import own_share
from rlhf.training import sft
from rlhf.training.supervised import Batch


@dataclass(frozen=True)
class Ptx:
    """Rows of the SFT stage: `size` of them in each of `steps` optimizer steps, in micro-batches."""

    rows: Rows
    coef: float
    pad_id: int
    pack_width: int | None  # None: padded
    seed: int
    size: int
    steps: int
    micro_batch_size: int

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, int]]:
        """Yield this process's micro-batches, each with the number of response tokens in the whole batch.

        Args:
            step: optimizer steps before this one; it decides the rows.
        """
        lengths = self.rows.tokens_per_row
        chosen = [self.rows[int(i)] for i in order.batch(lengths, self.size, step, self.steps, self.seed)]
        tokens = sft.response_tokens(chosen)
        for start in own_share(range(0, self.size, self.micro_batch_size)):
            yield chosen[start : start + self.micro_batch_size], tokens

    def loss(self, model: Any, rows: Batch, tokens: int) -> Tensor:
        """Return a micro-batch's part of the mean loss per token, a float32 scalar, before `coef`."""
        task = sft.task(self.pad_id, self.pack_width)
        return task.loss(model, task.arrange(rows)) / tokens
