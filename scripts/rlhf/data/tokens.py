"""Layout of token batches: padding, packing, masks, positions.

No other module compares ids to the pad id. Letters: B rows of a batch, N sequences, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.rows import Ids


@dataclass(frozen=True)
class Padded:
    """Sequences padded to one length."""

    ids: Tensor  # (B, T) int64; the pad id where mask is False
    mask: Tensor  # (B, T) bool; True: a real token
    left_aligned: bool = False  # padding is on the right only

    def to(self, device: torch.device) -> Padded:
        """Return the same sequences, ids and mask (B, T), on a device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    @property
    def positions(self) -> Tensor:
        """(B, T) int64: 0 at the first real token, on whichever side the padding is."""
        if self.left_aligned:
            return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)  # (B, T)
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def attention(self) -> Tensor | None:
        """(B, T) int64: 1 at real tokens, for the model to combine with its causal mask.

        None if no real token has padding before it: then the causal mask hides all padding, and
        attention without another mask is faster.
        """
        return None if self.left_aligned else self.mask.long()

    @property
    def ends(self) -> Tensor:
        """(B,) int64: index of each sequence's last token in the flattened batch."""
        return torch.arange(len(self.ids), device=self.ids.device) * self.ids.shape[1] + self.last

    def compact(self) -> Padded:
        """Return the same sequences padded on the right, (B, longest sequence)."""
        order = (~self.mask).long().argsort(dim=-1, stable=True)  # (B, T): real tokens first, in their order
        longest = int(self.mask.sum(-1).max())
        ids, mask = (x.gather(1, order)[:, :longest] for x in (self.ids, self.mask))  # (B, longest)
        return Padded(ids, mask, left_aligned=True)

    def packed(self) -> Packed:
        """Return the same sequences one after another in one row, (1, N) for N real tokens."""
        lengths = self.mask.sum(-1)  # (B,)
        boundaries = F.pad(lengths.cumsum(0), (1, 0))  # (B + 1,)
        numbers = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(lengths)
        return Packed(
            ids=self.ids[self.mask][None],
            sequences=numbers[None],
            positions=self.positions[self.mask][None],
            ends=boundaries[1:] - 1,
            boundaries=boundaries.int(),
            longest=int(lengths.max()),
        )

    @property
    def last(self) -> Tensor:
        """(B,) int64: column of the last real token."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)  # (T,)
        return (columns * self.mask).argmax(-1)


@dataclass(frozen=True)
class Packed:
    """Sequences one after another in rows; they do not attend to each other."""

    ids: Tensor  # (B, T) int64; the pad id at padding
    sequences: Tensor  # (B, T) int64: number of the sequence that a token belongs to; -1 at padding
    positions: Tensor  # (B, T) int64: position in its sequence
    ends: Tensor  # (N,) int64: index of each sequence's last token in the flattened batch
    # (S + 1,) int32: where each of S runs begins in the flattened batch, and the end of the last.
    # A run is a sequence or consecutive padding.
    boundaries: Tensor
    longest: int  # tokens of the longest run

    def to(self, device: torch.device) -> Packed:
        """Return the same batch, with tensors of the same shapes, on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "longest"}
        return replace(self, **tensors)

    @property
    def attention(self) -> Tensor:
        """(B, 1, T, T) bool: a token attends to its own sequence up to itself; padding to padding.

        Positions that begin at 0 in each sequence do not suffice: without a mask a sequence attends to
        those before it.
        """
        same = self.sequences[:, :, None] == self.sequences[:, None, :]  # (B, T, T)
        return same.tril()[:, None]  # (B, 1, T, T)


def pack(groups: Sequence[Sequence[Ids]], pad_id: int, width: int) -> Packed:
    """Return sequences in rows of at most `width` tokens; those of a group share a row.

    A group that is longer than `width` has a longer row to itself.

    Args:
        groups: token ids of each sequence of each group, N sequences together.
    """
    sizes = [sum(map(len, group)) for group in groups]
    rows = _balanced(sizes, width)  # groups of each row
    longest = max(sum(sizes[g] for g in row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)  # (B, T)
    numbers, positions = np.full_like(ids, -1), np.zeros_like(ids)  # (B, T)
    first = np.cumsum([0, *map(len, groups)])  # (groups + 1,): number of each group's first sequence
    ends = np.zeros(first[-1], np.int64)  # (N,)
    for r, row in enumerate(rows):
        start = 0
        for number, tokens in ((first[g] + i, t) for g in row for i, t in enumerate(groups[g])):
            columns = slice(start, start + len(tokens))
            ids[r, columns], numbers[r, columns], positions[r, columns] = (
                tokens,
                number,
                np.arange(len(tokens)),
            )
            start += len(tokens)
            ends[number] = r * longest + start - 1
    # A run begins where the sequence's number changes in the flattened batch.
    boundaries = np.r_[0, np.flatnonzero(np.diff(numbers.ravel())) + 1, ids.size].astype(np.int32)
    return Packed(
        ids=torch.from_numpy(ids),
        sequences=torch.from_numpy(numbers),
        positions=torch.from_numpy(positions),
        ends=torch.from_numpy(ends),
        boundaries=torch.from_numpy(boundaries),
        longest=int(np.diff(boundaries).max()),
    )


def _balanced(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Return the groups of each row: few rows, filled evenly.

    Groups are assigned from the longest to the shortest, each to the row with the fewest tokens.
    """
    count = max(1, -(-sum(sizes) // width))  # rounded up
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
    """Return groups of sequences as a batch: packed into rows of `pack_width` tokens, or else padded."""
    if pack_width is not None:
        return pack(groups, pad_id, pack_width)
    return pad([tokens for group in groups for tokens in group], pad_id, side="right")


def pad(sequences: Sequence[Ids], pad_id: int, *, side: str) -> Padded:
    """Return token sequences padded on the `left`, to generate after them, or on the `right`."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), pad_id, np.int64)  # (B, T)
    mask = np.zeros_like(ids, dtype=bool)  # (B, T)
    for i, tokens in enumerate(sequences):
        columns = slice(longest - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[i, columns], mask[i, columns] = tokens, True
    return Padded(torch.from_numpy(ids), torch.from_numpy(mask), left_aligned=side == "right")


def response_labels(prompt_lengths: Sequence[int] | Tensor, batch: Padded | Packed) -> Tensor:
    """Return (B, T) bool: True on each sequence's response and EOS, but not on prompts and padding.

    Args:
        prompt_lengths: (N,) tokens of each sequence's prompt.
        batch: packed, or padded on the right.
    """
    starts = torch.as_tensor(prompt_lengths, device=batch.ids.device)  # (N,)
    if isinstance(batch, Packed):
        return (batch.sequences >= 0) & (batch.positions >= starts[batch.sequences.clamp(min=0)])
    return batch.mask & (batch.positions >= starts[:, None])
