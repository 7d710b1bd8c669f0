"""Rollouts: responses of the actor with all that PPO needs to learn from them.

Letters: B rows of a rollout, b rows of a micro-batch, P tokens of the longest prompt, A of the longest
response, T of the longest prompt and response, N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import parallel
from rlhf.config.training import RlhfRun
from rlhf.data.rows import Ids
from rlhf.data.streams import Stream
from rlhf.data.tokens import Packed, Padded, response_labels
from rlhf.generation.distributed import sample
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Generated
from rlhf.models import packing
from rlhf.models.lora import adapters_disabled
from rlhf.models.outputs import evaluating, response_logprobs, response_values, scores
from rlhf.training.wrapped import unwrap

WASTE = 0.1  # of a batch's tokens; kernels of variable length lose as much on rows of one length


@dataclass(frozen=True)
class Rollout:
    """What the actor did, and what the other models say about it."""

    batch: Padded  # (B, P + A): left padding, prompt, response, right padding
    response_mask: Tensor  # (B, A) bool; True on the response and its EOS
    ended: Tensor  # (B,) bool; True: the response ends with EOS
    sampled_logprobs: Tensor  # (B, A) float32: log pi of the actor, by the sampler, as each token was sampled
    old_logprobs: Tensor  # (B, A) float32: log pi of the actor, by the engine that trains it
    ref_logprobs: Tensor  # (B, A) float32: log pi of the SFT model
    values: Tensor  # (B, A) float32: the critic's value of the state before each token
    scores: Tensor  # (B,) float32: the reward model's raw score

    def resized(self, left: int, right: int, pad_id: int = 0) -> Rollout:
        """Return the same with more padding: `batch` (B, left + P + A + right), the others (B, A + right)."""
        ids = F.pad(self.batch.ids, (left, right), value=pad_id)
        per_token = {name: F.pad(getattr(self, name), (0, right)) for name in PER_TOKEN}
        return replace(self, batch=Padded(ids, F.pad(self.batch.mask, (left, right))), **per_token)


PER_TOKEN = ("response_mask", "sampled_logprobs", "old_logprobs", "ref_logprobs", "values")


@dataclass(frozen=True)
class Models:
    """The four models of PPO: Hugging Face models, or what `engine` wraps around them for training.

    Without a `reference` the actor with its adapters disabled is the reference.
    """

    actor: Any
    critic: Any
    reference: Any | None
    reward: Any

    @property
    def read_packed_rows(self) -> bool:
        """Whether they attend by kernels, as all do or none, and can read packed rows."""
        return packing.uses_kernel(unwrap(self.actor))


def roll_out(
    models: Models, sampler: Sampler, prompts: Sequence[Ids], stream: Stream, run: RlhfRun
) -> Rollout:
    """Return the rollout over all B prompts in every process; each process samples and reads a part of it.

    Shapes and dtypes are those of `Rollout`. A response depends on its sample number in `stream`, not on the
    process that samples it.

    Args:
        models: wrapped by `engine`.

    Raises:
        UserError: the processes of the sampler's group cannot divide the actor evenly.
        ValueError: the prompts cannot be divided evenly among the processes.
    """
    sampler.refresh()
    generated = sample(sampler, prompts, stream, run)
    sampler.release()
    sampling = sampler.sampling
    parts = [observe(models, part, sampling.temperature, run.micro_rows) for part in generated]
    return _joined(parts, sampling.pad_id)


def observe(models: Models, generated: Generated, temperature: float, micro_batch_size: int) -> Rollout:
    """Return B responses with what all four models say about them, computed without gradients.

    Shapes and dtypes are those of `Rollout`, P and A those of `generated`. Models, wrapped by `engine`, read
    at most `micro_batch_size` responses at a time.
    """
    mask = generated.response_mask  # (B, A)
    old, ref, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))  # (B, A)
    scored = torch.zeros(len(mask), device=mask.device)  # (B,)
    everything = torch.arange(len(mask), device=mask.device)
    with evaluating(models.actor), evaluating(models.critic):
        for rows in by_length(generated.batch, everything, micro_batch_size):
            batch, labels = compacted(generated.batch, mask, rows, packs=models.read_packed_rows)
            old[rows] = scatter(models.actor(response_logprobs, batch, labels, temperature), mask[rows])
            with _reference(models) as reference:
                ref[rows] = scatter(reference(response_logprobs, batch, labels, temperature), mask[rows])
            values[rows] = scatter(models.critic(response_values, batch, labels), mask[rows])
            scored[rows] = models.reward(scores, batch)
    return Rollout(generated.batch, mask, generated.ended, generated.logprobs, old, ref, values, scored)


def by_length(batch: Padded, rows: Tensor, size: int) -> Sequence[Tensor]:
    """Return some `rows` of a (B, P + A) batch, (b,) int64, as micro-batches of similar length.

    Each is int64, of at most `size` rows.
    """
    return rows[batch.mask.sum(-1)[rows].argsort(stable=True)].split(size)


def compacted(
    batch: Padded, response_mask: Tensor, rows: Tensor, *, packs: bool = False
) -> tuple[Padded | Packed, Tensor]:
    """Return some prompts with their responses, without padding in between.

    Args:
        batch: (B, P + A), as in a rollout.
        response_mask: (B, A) bool.
        rows: (b,) int64, which of them.
        packs: all in one row, if more than `WASTE` of the tokens were padding otherwise.

    Returns:
        the sequences, (1, T) or (b, T) padded on the right, and their labels, bool of the same shape, True on
        responses. Labels select the same tokens as `response_mask` does, in the same order.
    """
    chosen = Padded(batch.ids[rows], batch.mask[rows])  # (b, P + A)
    prompts = chosen.mask.sum(-1) - response_mask[rows].sum(-1)  # (b,)
    compact = chosen.compact()  # (b, T)
    arranged = compact.packed() if packs and compact.mask.float().mean() < 1 - WASTE else compact
    return arranged, response_labels(prompts, arranged)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Return (B, A) with `values` (N,) where `mask`, (B, A) bool, is True, row by row; 0 elsewhere.

    The dtype is that of `values`.
    """
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)


@contextmanager
def _reference(models: Models) -> Iterator[Any]:
    if models.reference is not None:
        yield models.reference
        return
    with adapters_disabled(unwrap(models.actor)):
        yield models.actor


def _joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Return the rollouts of all parts and all processes as one, padded to the widest of them."""
    sizes = [(p.batch.ids.shape[1] - p.response_mask.shape[1], p.response_mask.shape[1]) for p in parts]
    prompts, length = parallel.all_max([max(n) for n in zip(*sizes, strict=True)])
    wide = [p.resized(prompts - own, length - a, pad_id) for p, (own, a) in zip(parts, sizes, strict=True)]

    def column(name: str) -> Tensor:
        return parallel.all_gather_rows(torch.cat([getattr(p, name) for p in wide]))

    batch = Padded(
        parallel.all_gather_rows(torch.cat([p.batch.ids for p in wide])),
        parallel.all_gather_rows(torch.cat([p.batch.mask for p in wide])),
    )
    return Rollout(batch, *(column(f.name) for f in fields(Rollout) if f.name != "batch"))
