"""How responses are sampled, and what sampling returns.

A sample's randomness is one row of `uniforms`, so that a response depends neither on the other prompts
of its batch nor on the number of processes.

Letters: B responses, P tokens of the longest prompt, A tokens of the longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.data.streams import Stream
from rlhf.data.tokens import Padded


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
    logprobs: Tensor  # (B, A) float32: log-probability of each token as it was sampled; 0 outside the mask

    @property
    def responses(self) -> Tensor:
        """(B, A) int64 tokens of the responses; the pad id after their end."""
        return self.batch.ids[:, -self.response_mask.shape[1] :]

    def rows(self, chosen: slice) -> Generated:
        """Return the `chosen` rows; (P + A) and A stay."""
        batch = Padded(self.batch.ids[chosen], self.batch.mask[chosen])
        return Generated(batch, self.response_mask[chosen], self.ended[chosen], self.logprobs[chosen])


def uniforms(stream: Stream, samples: Iterable[int], length: int) -> Tensor:
    """Return (B, length) float64 in [0, 1): a sample's row depends on its number alone.

    Args:
        samples: B numbers, counted from the stream's first sample.
    """
    return torch.from_numpy(np.stack([stream.row(sample, length) for sample in samples]))


def draw(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Return (B,) int64 tokens: the first ones whose cumulated probability exceeds the noise.

    Greedy ones have the largest logit.

    Args:
        logits: (B, V), of any float dtype; computed in float64.
        noise: (B,) float64 in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    target = noise[:, None] * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


def logprobs_of(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return (B,) float32: log-probabilities of (B,) int64 tokens under (B, V) logits.

    For greedy sampling they are those of temperature 1.
    """
    scaled = logits.float() / (temperature or 1.0)
    return scaled.gather(-1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)


def sample(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) int64 tokens, and (B,) float32 log-probabilities of them, for (B, V) logits of any
    float dtype.

    On CUDA, if not greedy, Triton kernels do what `draw` and `logprobs_of` do, but for rounding.

    Args:
        noise: (B,) float64 in [0, 1), not used when greedy.
    """
    if temperature and logits.device.type == "cuda":
        # Imported here: a CPU build of torch has no Triton.
        from rlhf.generation import kernels  # noqa: PLC0415

        return kernels.draw(logits, temperature, noise)
    tokens = draw(logits, temperature, noise)
    return tokens, logprobs_of(logits, tokens, temperature)


def assemble(prompts: Padded, tokens: Tensor, counts: Tensor, logprobs: Tensor, eos_id: int) -> Generated:
    """Return prompts and responses as one batch, as wide as the longest response.

    Args:
        prompts: (B, P), padded on the left.
        tokens: (B, max_new_tokens) int64, the responses; the pad id after their end.
        counts: (B,) int64, tokens of each response.
        logprobs: (B, max_new_tokens) float32.
    """
    length = int(counts.max())
    mask = torch.arange(length, device=counts.device) < counts[:, None]  # (B, A)
    batch = Padded(
        torch.cat([prompts.ids, tokens[:, :length]], dim=1), torch.cat([prompts.mask, mask], dim=1)
    )
    ended = tokens.gather(1, counts[:, None] - 1)[:, 0] == eos_id
    return Generated(batch, mask, ended, logprobs[:, :length] * mask)
