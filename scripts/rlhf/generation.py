"""The generation engine: sampled replies of a model that is being trained.

It uses the model's own weights (no copy), a cache allocated once, left-padded prompts, and stops
when every reply has ended. A sample's randomness is one row of `uniforms`, so that a reply depends
neither on its company in the batch nor on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from rlhf.models import evaluating
from rlhf.parallel import Group, agreed, group
from rlhf.streams import Purpose, rng
from rlhf.tokens import Padded


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class Generated:
    """Prompts with their replies. A is the longest reply's length."""

    batch: Padded  # (B, P + A): left padding, prompt, reply, right padding
    response_mask: Tensor  # (B, A) bool; True on the reply and its EOS
    ended: Tensor  # (B,) bool; True: the reply ends with EOS

    @property
    def responses(self) -> Tensor:
        """(B, A) int64 tokens of the replies; the pad id after their end."""
        return self.batch.ids[:, -self.response_mask.shape[1] :]

    def rows(self, chosen: slice) -> Generated:
        """Return some of them, as wide as all."""
        batch = Padded(self.batch.ids[chosen], self.batch.mask[chosen])
        return Generated(batch, self.response_mask[chosen], self.ended[chosen])


def uniforms(seed: int, purpose: Purpose, samples: Any, length: int) -> Tensor:
    """Return (B, length) float64 in [0, 1): a sample's row depends on its number alone.

    Args:
        samples: (B,) number of each sample in the whole training.
    """
    rows = [rng(seed, purpose, int(s)).random(length) for s in samples]
    return torch.from_numpy(np.stack(rows))


def generate(
    model: Any, prompts: Padded, sampling: Sampling, noise: Tensor, together: Group | None = None
) -> Generated:
    """Reply to left-padded prompts.

    Args:
        prompts: (B, P), padded on the left.
        noise: (B, max_new_tokens) from `uniforms`; not looked at when greedy.
        together: the processes that have a part of the model each; all pass the same prompts and noise.
    """
    together = together or group(1)
    size, width = prompts.ids.shape
    length = sampling.max_new_tokens
    ids = prompts.ids.new_full((size, width + length), sampling.pad_id)
    ids[:, :width] = prompts.ids
    # Later places are masked by causality until they are written, so the mask is made once.
    attention = torch.cat([prompts.mask, prompts.mask.new_ones(size, length)], dim=1).long()
    positions, noise = prompts.positions, noise.to(ids.device)
    response_mask = prompts.mask.new_zeros(size, length)
    running = prompts.mask.new_ones(size)
    cache = StaticCache(config=model.config, max_cache_len=width + length)
    with evaluating(model):
        inputs = prompts.ids
        for step in range(length):
            output = model(
                input_ids=inputs, attention_mask=attention, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            token = draw(output.logits[:, -1], sampling.temperature, noise[:, step])
            # Parts that go on from different tokens would be of no model: one process decides.
            token = agreed(torch.where(running, token, sampling.pad_id), together)
            ids[:, width + step], response_mask[:, step] = token, running
            running = running & (token != sampling.eos_id)
            if not running.any():
                break
            inputs, positions = token[:, None], positions[:, -1:] + 1
    done = step + 1
    mask = torch.cat([prompts.mask, response_mask[:, :done]], dim=1)
    return Generated(Padded(ids[:, : width + done], mask), response_mask[:, :done], ~running)


def draw(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Return (B,) tokens: the place of `noise` (B,) in the cumulated probabilities of (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    target = noise[:, None] * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)
