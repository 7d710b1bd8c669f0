"""The generation engine: samples responses of a model that is being trained.

It uses the model's own weights (no copy), a cache that is allocated once, left-padded prompts, and
stops when every response has ended. A sample's randomness is one row of `uniforms`, so that a response
depends neither on the other prompts of its batch nor on the number of processes.

Letters: B batch, P tokens of a prompt, A of the longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from rlhf.data.streams import Stream
from rlhf.data.tokens import Padded
from rlhf.models.outputs import evaluating
from rlhf.parallel import Group, group, group_broadcast


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class Generated:
    """Prompts with their responses."""

    batch: Padded  # (B, P + A): left padding, prompt, response, right padding
    response_mask: Tensor  # (B, A) bool; True on the response and its EOS
    ended: Tensor  # (B,) bool; True: the response ends with EOS

    @property
    def responses(self) -> Tensor:
        """(B, A) int64 tokens of the responses; the pad id after their end."""
        return self.batch.ids[:, -self.response_mask.shape[1] :]

    def rows(self, chosen: slice) -> Generated:
        """Return some of the rows, as wide as all of them."""
        batch = Padded(self.batch.ids[chosen], self.batch.mask[chosen])
        return Generated(batch, self.response_mask[chosen], self.ended[chosen])


def uniforms(stream: Stream, samples: Iterable[int], length: int) -> Tensor:
    """Return (B, length) float64 in [0, 1): a sample's row depends on its number alone.

    Args:
        samples: B numbers, counted from the stream's first sample.
    """
    return torch.from_numpy(np.stack([stream.row(sample, length) for sample in samples]))


def generate(
    model: Any, prompts: Padded, sampling: Sampling, noise: Tensor, together: Group | None = None
) -> Generated:
    """Sample one response to each left-padded prompt.

    Args:
        model: a bare causal language model.
        prompts: (B, P), padded on the left.
        noise: (B, max_new_tokens) float64 from `uniforms`; not used when greedy.
        together: the processes that have a shard of the model each; all pass the same prompts and noise.
    """
    together = together or group(1)
    size, width = prompts.ids.shape
    length = sampling.max_new_tokens
    ids = prompts.ids.new_full((size, width + length), sampling.pad_id)  # (B, P + A)
    ids[:, :width] = prompts.ids
    # Causality hides later places until they are written, so the mask is made once.
    attention = torch.cat([prompts.mask, prompts.mask.new_ones(size, length)], dim=1).long()
    positions, noise = prompts.positions, noise.to(ids.device)
    response_mask = prompts.mask.new_zeros(size, length)  # (B, A)
    running = prompts.mask.new_ones(size)  # (B,)
    cache = StaticCache(config=model.config, max_cache_len=width + length)
    with evaluating(model):
        inputs = prompts.ids  # (B, P), from then on (B, 1)
        for step in range(length):
            output = model(
                input_ids=inputs,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            token = draw(output.logits[:, -1], sampling.temperature, noise[:, step])  # (B,)
            # Shards that continue from different tokens would be no model's: one process decides.
            token = group_broadcast(torch.where(running, token, sampling.pad_id), together)
            ids[:, width + step], response_mask[:, step] = token, running
            running = running & (token != sampling.eos_id)
            if not running.any():
                break
            inputs, positions = token[:, None], positions[:, -1:] + 1
    done = step + 1
    mask = torch.cat([prompts.mask, response_mask[:, :done]], dim=1)
    return Generated(Padded(ids[:, : width + done], mask), response_mask[:, :done], ~running)


def draw(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Return (B,) int64 tokens: where `noise` (B,) falls among the cumulated probabilities of (B, V) logits."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)
    target = noise[:, None] * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)
