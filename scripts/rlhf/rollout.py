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
from rlhf.models import evaluating, response_logprobs, scores, token_values
from rlhf.parallel import Group
from rlhf.sharding import generator
from rlhf.streams import Purpose
from rlhf.tokens import Ids, Padded, pad


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

    def rows(self, chosen: Tensor) -> Rollout:
        """Return some replies, as narrow as the longest prompt and the longest reply among them."""
        picked = Rollout(
            Padded(self.batch.ids[chosen], self.batch.mask[chosen]),
            *(getattr(self, f.name)[chosen] for f in fields(self) if f.name != "batch"),
        )
        prompts = picked.batch.mask.shape[1] - picked.response_mask.shape[1]
        left = prompts - int(picked.batch.mask[:, :prompts].sum(-1).max())
        right = picked.response_mask.shape[1] - int(picked.response_mask.sum(-1).max())
        return picked.resized(-left, -right)

    def resized(self, left: int, right: int, pad_id: int = 0) -> Rollout:
        """Return the same with more padding on both sides, or less where a number is negative."""
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
    length = made.response_mask.shape[1]
    columns: list[list[Tensor]] = [[], [], [], []]
    with evaluating(models.actor), evaluating(models.critic):
        for part in micro_batches(len(made.ended), micro_batch_size):
            batch = Padded(made.batch.ids[part], made.batch.mask[part])
            columns[0].append(models.actor(response_logprobs, batch, length, temperature))
            with _reference(models) as reference:
                columns[1].append(reference(response_logprobs, batch, length, temperature))
            columns[2].append(models.critic(token_values, batch)[:, -length - 1 : -1])
            columns[3].append(models.reward(scores, batch))
    return Rollout(made.batch, made.response_mask, made.ended, *map(torch.cat, columns))


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
