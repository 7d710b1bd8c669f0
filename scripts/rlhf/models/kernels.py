"""Triton kernels of log-probabilities. Imported on CUDA only.

Without them a 32-bit copy of the logits, their log-softmax and its gradient have to be written and read.
The same in torch, as a reference: `outputs.token_logprobs` and `outputs.entropy`.

Letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program reads at a time


@triton.jit
def _forward(
    LOGITS, TOKENS, LOGPROBS, ENTROPIES, SUMS, inverse,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: softmax as it goes (Milakov and Gimelshein 2018), and the mean logit under it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest, total, weighted = float("-inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        valid = start + column < V
        x = (
            tl.load(LOGITS + row * V + start + column, mask=valid, other=float("-inf")).to(tl.float32)
            * inverse
        )
        new = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(new == float("-inf"), 0.0, new)  # of blocks in which nothing is possible
        weight = tl.exp(x - finite)
        shrink = tl.exp(largest - finite)
        total = total * shrink + tl.sum(weight, 0)
        weighted = weighted * shrink + tl.sum(tl.where(weight > 0, weight * x, 0.0), 0)
        largest = new
    log_sum = largest + tl.log(total)
    token = tl.load(TOKENS + row)
    x = tl.load(LOGITS + row * V + token).to(tl.float32) * inverse
    tl.store(LOGPROBS + row, x - log_sum)
    tl.store(ENTROPIES + row, log_sum - weighted / total)
    tl.store(SUMS + row, log_sum)


@triton.jit
def _backward(
    LOGITS, TOKENS, SUMS, GRADIENT, inverse, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token and block: replace logits by the gradient, (token is this one - probability)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < V
    x = tl.load(LOGITS + row * V + column, mask=valid, other=0.0).to(tl.float32) * inverse
    probability = tl.exp(x - tl.load(SUMS + row))
    is_token = (column == tl.load(TOKENS + row)).to(tl.float32)
    gradient = tl.load(GRADIENT + row) * inverse * (is_token - probability)
    tl.store(LOGITS + row * V + column, gradient.to(LOGITS.dtype.element_ty), mask=valid)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        count, vocabulary = logits.shape
        logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
        entropies, sums = torch.empty_like(logprobs), torch.empty_like(logprobs)
        if count:
            _forward[(count,)](
                logits, tokens, logprobs, entropies, sums, 1 / temperature, vocabulary, BLOCK, num_warps=8
            )
        ctx.save_for_backward(logits, tokens, sums)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, sums = ctx.saved_tensors
        count, vocabulary = logits.shape
        if count:
            _backward[(count, triton.cdiv(vocabulary, BLOCK))](
                logits,
                tokens,
                sums,
                gradient.contiguous(),
                1 / ctx.temperature,
                vocabulary,
                BLOCK,
                num_warps=8,
            )
        return logits, None, None


def logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (N,) float32 log-probabilities of tokens, and (N,) float32 entropies, which have no gradient.

    The backward pass writes the gradient of the logits into the logits.

    Args:
        logits: (N, V) of any float dtype, contiguous, which nothing else reads.
        tokens: (N,) int64.
        temperature: above 0; logits are divided by it.
    """
    found: tuple[Tensor, Tensor] = _Logprobs.apply(logits, tokens, temperature)  # type: ignore[no-untyped-call]
    return found
