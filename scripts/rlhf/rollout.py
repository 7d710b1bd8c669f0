"""Rollouts: replies of the actor with all that PPO needs to learn from them.

Letters: B batch, P tokens of a prompt, A of a response.
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
from rlhf.batch import exact_div
from rlhf.config import RlhfRun
from rlhf.engine import bare
from rlhf.generation import Generated, Sampling, generate, uniforms
from rlhf.lora import off
from rlhf.models import evaluating, response_logprobs, response_values, scores
from rlhf.parallel import Group
from rlhf.sharding import generator
from rlhf.streams import Purpose
from rlhf.tokens import Ids, Padded, pad, response_labels


@dataclass(frozen=True)
class Rollout:
    """What the actor did, and what the other models say of it."""

    batch: Padded  # (B, P + A) left padding, prompt, response, right padding
    response_mask: Tensor  # (B, A) bool; True on the response and its EOS
    ended: Tensor  # (B,) bool; True: the response ends with EOS
    old_logprobs: Tensor  # (B, A) log pi of the actor, by the engine that trains it
    ref_logprobs: Tensor  # (B, A) log pi of the SFT model
    values: Tensor  # (B, A) the critic's value of the state before each token
    scores: Tensor  # (B,) the reward model's raw score

    def resized(self, left: int, right: int, pad_id: int = 0) -> Rollout:
        """Return the same with more padding on both sides."""
        ids = F.pad(self.batch.ids, (left, right), value=pad_id)
        per_token = {
            f.name: F.pad(getattr(self, f.name), (0, right)) for f in fields(self) if f.name in PER_TOKEN
        }
        return replace(self, batch=Padded(ids, F.pad(self.batch.mask, (left, right))), **per_token)


PER_TOKEN = ("response_mask", "old_logprobs", "ref_logprobs", "values")


@dataclass(frozen=True)
class Models:
    """The four models of step 3: engines or `engine.Root`s.

    Without a `reference` the actor is one while its adapters are off.
    """

    actor: Any
    critic: Any
    reference: Any | None
    reward: Any


def reply(
    actor: Any, prompts: Sequence[Ids], sampling: Sampling, seed: int, purpose: Purpose, numbers: Sequence[int],
    together: Group | None = None,
) -> Generated:  # fmt: skip
    """Sample one reply of a bare model to each prompt, which has a sample number each.

    Args:
        together: as in `generation.generate`.
    """
    batch = pad(prompts, sampling.pad_id, side="left").to(parallel.device())
    noise = uniforms(seed, purpose, numbers, sampling.max_new_tokens)
    return generate(actor, batch, sampling, noise, together)


def sample(
    actor: Any,
    prompts: Sequence[Ids],
    sampling: Sampling,
    seed: int,
    purpose: Purpose,
    first: int,
    run: RlhfRun,
) -> Iterator[Generated]:
    """Yield this process's share of the replies to all prompts; a group computes its shares together.

    Args:
        actor: what `sharding.generator` returned.
        first: sample number of the first prompt.
    """
    share = exact_div(len(prompts), parallel.world_size(), "prompts over processes")
    group = parallel.group(run.inference_tp_size)
    for part in micro_batches(share, run.generation_batch_size):
        places = [rank * share + i for rank in group.ranks for i in range(share)[part]]
        asked, numbers = [prompts[p] for p in places], [first + p for p in places]
        made = reply(actor, asked, sampling, seed, purpose, numbers, group)
        own = exact_div(len(places), group.size, "replies of a group")
        yield made.rows(slice(group.place * own, (group.place + 1) * own))


def roll_out(
    models: Models, prompts: Sequence[Ids], sampling: Sampling, seed: int, purpose: Purpose, first: int,
    run: RlhfRun,
) -> Rollout:  # fmt: skip
    """Return the rollout over `prompts`, the whole of it in every process; each samples a part.

    A reply depends on its sample number, not on the process that draws it.
    """
    actor = generator(bare(models.actor), parallel.group(run.inference_tp_size))
    made = list(sample(actor, prompts, sampling, seed, purpose, first, run))
    del actor
    seen = [observe(models, part, sampling.temperature, run.micro_batch_size) for part in made]
    return _joined(seen, sampling.pad_id)


def observe(models: Models, made: Generated, temperature: float, micro_batch_size: int) -> Rollout:
    """Let all four models look at replies, a micro-batch at a time, without gradients."""
    mask = made.response_mask
    old, ref, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    scored = torch.zeros(len(mask), device=mask.device)
    with evaluating(models.actor), evaluating(models.critic):
        for rows in by_length(made.batch, torch.arange(len(mask), device=mask.device), micro_batch_size):
            batch, replies = as_read(made.batch, mask, rows)
            old[rows] = spread(models.actor(response_logprobs, batch, replies, temperature), mask[rows])
            with _reference(models) as reference:
                ref[rows] = spread(reference(response_logprobs, batch, replies, temperature), mask[rows])
            values[rows] = spread(models.critic(response_values, batch, replies), mask[rows])
            scored[rows] = models.reward(scores, batch)
    return Rollout(made.batch, mask, made.ended, old, ref, values, scored)


def by_length(batch: Padded, rows: Tensor, size: int) -> Sequence[Tensor]:
    """Return micro-batches of at most `size` of the `rows`, those of like length together."""
    return rows[batch.mask.sum(-1)[rows].argsort(stable=True)].split(size)


def as_read(batch: Padded, response_mask: Tensor, rows: Tensor) -> tuple[Padded, Tensor]:
    """Return some prompts with their replies as models read them, without padding between and before.

    Returns:
        (B, T) padded on the right, and (B, T) bool, True on the replies. Row by row their tokens are those
        where `response_mask` is True, in the same order.
    """
    whole = Padded(batch.ids[rows], batch.mask[rows])
    read, prompts = whole.compact(), whole.mask.sum(-1) - response_mask[rows].sum(-1)
    return read, response_labels(prompts, read)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return (B, A) with (N,) values where `mask` is True, row by row; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)


@contextmanager
def _reference(models: Models) -> Iterator[Any]:
    if models.reference is not None:
        yield models.reference
        return
    with off(bare(models.actor)):
        yield models.actor


def _joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Return the replies of all parts and all processes in one rollout, as wide as the widest."""
    sizes = [(p.batch.ids.shape[1] - p.response_mask.shape[1], p.response_mask.shape[1]) for p in parts]
    prompts, length = parallel.most([max(n) for n in zip(*sizes, strict=True)])
    wide = [p.resized(prompts - own, length - a, pad_id) for p, (own, a) in zip(parts, sizes, strict=True)]

    def column(name: str) -> Tensor:
        return parallel.rows(torch.cat([getattr(p, name) for p in wide]))

    batch = Padded(
        parallel.rows(torch.cat([p.batch.ids for p in wide])),
        parallel.rows(torch.cat([p.batch.mask for p in wide])),
    )
    return Rollout(batch, *(column(f.name) for f in fields(Rollout) if f.name != "batch"))


def micro_batches(size: int, part: int) -> Iterator[slice]:
    """Cut `size` rows into parts."""
    return (slice(start, start + part) for start in range(0, size, part))
