"""Layout of token batches: padding, packing, masks, positions. Nobody else compares ids to the pad id.

Letters: B batch, N sequences, T tokens of a row, P of a prompt, A of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

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
    flush: bool = False  # padding is on the right alone

    def to(self, device: torch.device) -> Padded:
        """Return the same on a device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    @property
    def positions(self) -> Tensor:
        """(B, T) int64: 0 at the first real token, whichever side the padding is on."""
        if self.flush:
            return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def attention(self) -> Tensor | None:
        """(B, T) int64: 1 at tokens that may be attended to; causality is the model's business.

        None where causality does it all: no real token has padding before it. Attention without a mask is quicker.
        """
        return None if self.flush else self.mask.long()

    @property
    def ends(self) -> Tensor:
        """(B,) int64: place of each sequence's last token when all rows are one."""
        return torch.arange(len(self.ids), device=self.ids.device) * self.ids.shape[1] + self.last

    def compact(self) -> Padded:
        """Return the same sequences from the first column on, as narrow as the longest of them."""
        order = (~self.mask).long().argsort(dim=-1, stable=True)  # real tokens first, in their order
        width = int(self.mask.sum(-1).max())
        ids, mask = (x.gather(1, order)[:, :width] for x in (self.ids, self.mask))
        return Padded(ids, mask, flush=True)

    @property
    def last(self) -> Tensor:
        """(B,) int64: index of the last real token."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (places * self.mask).argmax(-1)


@dataclass(frozen=True)
class Packed:
    """Sequences one after another in rows, which do not see each other."""

    ids: Tensor  # (B, T) int64; the pad id where no sequence is
    sequences: Tensor  # (B, T) int64: number of the sequence that a token belongs to; -1: padding
    positions: Tensor  # (B, T) int64: place in its sequence
    ends: Tensor  # (N,) int64: place of each sequence's last token when all rows are one
    boundaries: (
        Tensor  # (S + 1,) int32: where sequences and runs of padding begin when all rows are one; the end
    )
    longest: int  # tokens of the longest of them

    def to(self, device: torch.device) -> Packed:
        """Return the same on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "longest"}
        return replace(self, **tensors)

    @property
    def attention(self) -> Tensor:
        """(B, 1, T, T) bool: a token sees its own sequence up to itself; padding sees padding.

        Positions that begin anew would not do: without a mask a sequence sees those before it.
        """
        same = self.sequences[:, :, None] == self.sequences[:, None, :]
        return same.tril()[:, None]


def pack(groups: Sequence[Sequence[Ids]], pad_id: int, width: int) -> Packed:
    """Put sequences into rows of at most `width` tokens; those of a group stay in one row.

    The longest group goes first, each into the row that has least: rows come out evenly full.
    """
    sizes = [sum(map(len, group)) for group in groups]
    rows = _shared_out(sizes, width)
    longest = max(sum(sizes[g] for g in row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    numbers, positions = np.full_like(ids, -1), np.zeros_like(ids)
    first = np.cumsum([0, *map(len, groups)])
    ends = np.zeros(first[-1], np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, tokens in ((first[g] + i, t) for g in row for i, t in enumerate(groups[g])):
            where = slice(start, start + len(tokens))
            ids[r, where], numbers[r, where], positions[r, where] = tokens, number, np.arange(len(tokens))
            start += len(tokens)
            ends[number] = r * longest + start - 1
    boundaries = np.r_[0, np.flatnonzero(np.diff(numbers.ravel())) + 1, ids.size].astype(np.int32)
    tensors = map(torch.from_numpy, (ids, numbers, positions, ends, boundaries))
    return Packed(*tensors, longest=int(np.diff(boundaries).max()))


def _shared_out(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Return which sizes go into each row: as few rows as will do, evenly full."""
    count = max(1, -(-sum(sizes) // width))
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            emptiest = filled.index(min(filled))
            rows[emptiest].append(i)
            filled[emptiest] += sizes[i]
        if max(filled) <= max(width, *sizes) or count >= len(sizes):
            return [sorted(row) for row in rows if row]
        count += 1


def arrange(groups: Sequence[Sequence[Ids]], pad_id: int, pack_width: int | None) -> Padded | Packed:
    """Lay out groups of sequences for a forward: packed into rows, or padded without a width."""
    if pack_width is not None:
        return pack(groups, pad_id, pack_width)
    return pad([tokens for group in groups for tokens in group], pad_id, side="right")


def pad(sequences: Sequence[Ids], pad_id: int, *, side: str) -> Padded:
    """Pad token sequences on the `left` (to generate after them) or on the `right`."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), pad_id, np.int64)
    mask = np.zeros_like(ids, dtype=bool)
    for i, tokens in enumerate(sequences):
        where = slice(longest - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[i, where], mask[i, where] = tokens, True
    return Padded(torch.from_numpy(ids), torch.from_numpy(mask), flush=side == "right")


def response_labels(prompt_lengths: Sequence[int] | Tensor, batch: Padded | Packed) -> Tensor:
    """Return (B, T) bool: True on the response and its EOS of each sequence, padded on the right."""
    starts = torch.as_tensor(prompt_lengths, device=batch.ids.device)
    if isinstance(batch, Packed):
        return (batch.sequences >= 0) & (batch.positions >= starts[batch.sequences.clamp(min=0)])
    return batch.mask & (batch.positions >= starts[:, None])
