"""Slots: the rows of a batch, in which responses are sampled together, a token of each per step.

A slot holds one response. When the response has ended, another prompt may get the slot. All that changes
from token to token is on the device, in tensors that stay where they are. So on CUDA one graph can do a step
of all slots. A group of several processes has no graph: its steps are launched kernel by kernel.

Letters: B slots, N new prompts that get slots, P tokens of the longest of them, A tokens that a response may
have (`max_new_tokens`), H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.generation import attention
from rlhf.generation.decoder import Decoder
from rlhf.generation.sampling import Sampling, sample
from rlhf.parallel import group_broadcast


class Slots:
    """`rows` slots for one decoder, each with `places` for the tokens of a prompt and its response."""

    def __init__(self, decoder: Decoder, rows: int, places: int, sampling: Sampling) -> None:
        self.decoder, self.rows, self.places, self.sampling = decoder, rows, places, sampling
        self.cache = attention.Cache(decoder, rows, places)
        device, length = decoder.device, sampling.max_new_tokens
        self.token = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) the newest token
        self.length = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens before the newest
        self.count = torch.zeros(rows, dtype=torch.long, device=device)  # (B,) tokens of the response
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)  # (B,) not ended yet
        self.noise = torch.zeros((rows, length), dtype=torch.double, device=device)  # (B, A)
        self.tokens = torch.zeros((rows, length), dtype=torch.long, device=device)  # (B, A)
        self.logprobs = torch.zeros((rows, length), device=device)  # (B, A)
        self._graph = self._captured() if decoder.uses_graph else None

    @torch.no_grad()
    def admit(self, rows: Tensor, prompts: Tensor, lengths: Tensor, noise: Tensor) -> None:
        """Give slots to prompts, and sample the first token of each response.

        Args:
            rows: (N,) int64, the slots.
            prompts: (N, P) int64, padded on the right.
            lengths: (N,) int64, tokens of each prompt.
            noise: (N, A) float64 in [0, 1).
        """
        decoder, sampling = self.decoder, self.sampling
        positions = torch.arange(prompts.shape[1], device=prompts.device).expand_as(prompts)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.prefill(self.cache, layer, rows, (q, k, v), decoder.scale)

        hidden = decoder.hidden(prompts, positions, attend)  # (N, P, H)
        last = hidden[torch.arange(len(rows), device=rows.device), lengths - 1]  # (N, H)
        token, logprob = self._sampled(decoder.logits(last), noise[:, 0])
        self.tokens[rows], self.logprobs[rows] = sampling.pad_id, 0.0
        self.tokens[rows, 0], self.logprobs[rows, 0] = token, logprob
        self.noise[rows], self.token[rows], self.length[rows], self.count[rows] = noise, token, lengths, 1
        self.running[rows] = (token != sampling.eos_id) & (sampling.max_new_tokens > 1)

    @torch.no_grad()
    def step(self, count: int) -> None:
        """Sample `count` more tokens of every running response, or fewer where it ends."""
        for _ in range(count):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _step(self) -> None:
        decoder, last = self.decoder, self.sampling.max_new_tokens - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.decode(self.cache, layer, self.length, (q, k, v), decoder.scale)

        hidden = decoder.hidden(self.token, self.length, attend)  # (B, H)
        place = self.count.clamp(max=last)[:, None]  # (B, 1)
        token, logprob = self._sampled(decoder.logits(hidden), self.noise.gather(1, place)[:, 0])
        # A slot that does not run computes too, and keeps what it has.
        running, kept = self.running, self.tokens.gather(1, place)[:, 0]
        self.tokens.scatter_(1, place, torch.where(running, token, kept)[:, None])
        kept_logprob = self.logprobs.gather(1, place)[:, 0]
        self.logprobs.scatter_(1, place, torch.where(running, logprob, kept_logprob)[:, None])
        self.token.copy_(torch.where(running, token, self.token))
        self.length += running
        self.count += running
        self.running &= (token != self.sampling.eos_id) & (self.count <= last)

    def _sampled(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) int64 tokens and (B,) float32 log-probabilities for (B, V) logits and (B,) noise."""
        token, logprob = sample(logits, self.sampling.temperature, noise)
        # Processes of a group must continue from the same token: the first one decides.
        group = self.decoder.group
        return group_broadcast(token, group), group_broadcast(logprob, group)

    @torch.no_grad()
    def _captured(self) -> Any:
        """Return the CUDA graph of a step. No slot runs yet, so these steps change no response."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled, and libraries set up, before the capture
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph
