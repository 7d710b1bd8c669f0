"""Layout of token batches: padding, masks, positions. Nobody else compares ids to the pad id.

Letters: B batch, T tokens of a sequence, P of a prompt, A of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Padded:
    """Sequences padded to one length."""

    ids: Tensor  # (B, T) int64; the pad id where mask is False
    mask: Tensor  # (B, T) bool; True: a real token

    def to(self, device: torch.device) -> Padded:
        """Return the same on a device."""
        return Padded(self.ids.to(device), self.mask.to(device))

    @property
    def positions(self) -> Tensor:
        """(B, T) int64: 0 at the first real token, whichever side the padding is on."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def last(self) -> Tensor:
        """(B,) int64: index of the last real token."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (places * self.mask).argmax(-1)


def pad(sequences: Sequence[Ids], pad_id: int, *, side: str) -> Padded:
    """Pad token sequences on the `left` (to generate after them) or on the `right`."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros_like(ids, dtype=bool)
    for i, tokens in enumerate(sequences):
        where = slice(longest - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[i, where], mask[i, where] = tokens, True
    return Padded(torch.from_numpy(ids), torch.from_numpy(mask))


def response_labels(prompt_lengths: Sequence[int], batch: Padded) -> Tensor:
    """Return (B, T) bool of a right-padded batch: True on the response and its EOS."""
    places = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    starts = torch.tensor(prompt_lengths, device=batch.mask.device)
    return batch.mask & (places >= starts[:, None])
