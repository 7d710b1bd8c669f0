"""Rollouts: replies of the actor with all that PPO needs to learn from them.

Letters: B batch, P tokens of a prompt, A of a response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.engine import device
from rlhf.generation import Generated, Sampling, generate, uniforms
from rlhf.models import evaluating, response_logits, scores, token_logprobs, token_values
from rlhf.tokens import Ids, Padded, pad

ROLLOUT, CALIBRATION, EVALUATION = 1, 2, 3  # purposes: each has its own stream of noise


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


@dataclass(frozen=True)
class Models:
    """The four models of step 3, bare."""

    actor: Any
    critic: Any
    reference: Any
    reward: Any


def reply(
    actor: Any, prompts: Sequence[Ids], sampling: Sampling, seed: int, purpose: int, first: int
) -> Generated:
    """Sample one reply to each prompt; sample numbers count on from `first`."""
    batch = pad(prompts, sampling.pad_id, side="left").to(device())
    numbers = range(first, first + len(prompts))
    return generate(actor, batch, sampling, uniforms(seed, purpose, numbers, sampling.max_new_tokens))


def observe(models: Models, made: Generated, temperature: float, micro_batch_size: int) -> Rollout:
    """Let all four models look at replies, a micro-batch at a time, without gradients."""
    length = made.response_mask.shape[1]
    columns: list[list[Tensor]] = [[], [], [], []]
    with evaluating(models.actor), evaluating(models.critic):
        for part in micro_batches(len(made.ended), micro_batch_size):
            batch = Padded(made.batch.ids[part], made.batch.mask[part])
            tokens = made.responses[part]
            for column, model in zip(columns, (models.actor, models.reference), strict=False):
                logits = response_logits(model, batch, length, temperature)
                column.append(token_logprobs(logits, tokens))
            columns[2].append(token_values(models.critic, batch)[:, -length - 1 : -1])
            columns[3].append(scores(models.reward, batch))
    return Rollout(made.batch, made.response_mask, made.ended, *map(torch.cat, columns))


def micro_batches(size: int, part: int) -> Iterator[slice]:
    """Cut `size` rows into parts."""
    return (slice(start, start + part) for start in range(0, size, part))
