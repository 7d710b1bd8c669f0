"""Triton kernels of the generation engine. Imported on CUDA only.

The same in torch, as references: `attention.decode_by_mask`, `decoder.Norm`, and `draw` and `logprobs_of` in
`sampling`.

Letters: B rows, C places (for a token each) of a row of the cache, D channels of a head, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens of the vocabulary that a program of `draw` reads
BLOCK = 64  # places of the cache that a program reads at a time; with one warp, the fastest of those tried


@triton.jit
def _decode(
    Q, K_NEW, V_NEW, KEYS, VALUES, LENGTHS, OUT, scale, q_row, k_row, v_row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and key-value head: write the new key and value, attend to all tokens so far."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, place = tl.arange(0, D), tl.arange(0, BLOCK)
    length = tl.load(LENGTHS + row)
    k_new = tl.load(K_NEW + row * k_row + head * D + d)
    v_new = tl.load(V_NEW + row * v_row + head * D + d)
    base = (row * HEADS + head) * C * D
    tl.store(KEYS + base + length * D + d, k_new)
    tl.store(VALUES + base + length * D + d, v_new)
    for member in tl.static_range(GROUP):  # queries that share the key
        query = head * GROUP + member
        q = tl.load(Q + row * q_row + query * D + d).to(tl.float32) * scale
        largest = tl.sum(q * k_new.to(tl.float32), 0)
        total, out = 1.0, v_new.to(tl.float32)
        for start in range(0, length, BLOCK):  # softmax as it goes: Milakov and Gimelshein 2018
            valid = start + place < length
            offset = base + (start + place)[:, None] * D + d[None, :]
            k = tl.load(KEYS + offset, mask=valid[:, None], other=0.0).to(tl.float32)
            v = tl.load(VALUES + offset, mask=valid[:, None], other=0.0).to(tl.float32)
            score = tl.where(valid, tl.sum(k * q[None, :], 1), float("-inf"))
            new = tl.maximum(largest, tl.max(score, 0))
            weight, shrink = tl.exp(score - new), tl.exp(largest - new)
            total = total * shrink + tl.sum(weight, 0)
            out = out * shrink + tl.sum(weight[:, None] * v, 0)
            largest = new
        tl.store(OUT + (row * HEADS * GROUP + query) * D + d, (out / total).to(OUT.dtype.element_ty))


def decode(
    keys: Tensor, values: Tensor, lengths: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Return (B, heads, D) of the queries' dtype, as `attention.decode` does; write the new key and value.

    Args:
        keys, values: (B, key-value heads, C, D) of any float dtype, contiguous: one layer of the cache, written
            in place. D is one of `attention.HEAD_DIMS`.
        lengths: (B,) int64, tokens before the new one.
        qkv: queries (B, heads, D), keys and values (B, key-value heads, D), of the cache's dtype, contiguous
            within a row.
    """
    q, k, v = qkv
    rows, heads, places, head_dim = keys.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode[(rows, heads)](
        q, k, v, keys, values, lengths, out, scale, q.stride(0), k.stride(0), v.stride(0),
        q.shape[1] // heads, heads, places, head_dim, BLOCK, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _add_norm(
    X, ADDED, WEIGHT, BIAS, OUT, eps, N: tl.constexpr, BLOCK: tl.constexpr,
    RMS: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per row: add to the hidden state, in place, and normalise it."""
    start = tl.program_id(0).to(tl.int64) * N
    channel = tl.arange(0, BLOCK)
    valid = channel < N
    x = tl.load(X + start + channel, mask=valid, other=0.0).to(tl.float32)
    if HAS_ADDED:
        x += tl.load(ADDED + start + channel, mask=valid, other=0.0).to(tl.float32)
        rounded = x.to(X.dtype.element_ty)
        tl.store(X + start + channel, rounded, mask=valid)
        x = rounded.to(tl.float32)
    weight = tl.load(WEIGHT + channel, mask=valid, other=0.0).to(tl.float32)
    if RMS:
        y = x * tl.rsqrt(tl.sum(x * x, 0) / N + eps) * weight
    else:
        centred = tl.where(valid, x - tl.sum(x, 0) / N, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / N + eps) * weight
    if HAS_BIAS:
        y += tl.load(BIAS + channel, mask=valid, other=0.0).to(tl.float32)
    tl.store(OUT + start + channel, y.to(OUT.dtype.element_ty), mask=valid)


def add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    """Add `added` to `x` in place, and return the norm of the sum; all (..., H), contiguous, of one dtype.

    It has six parameters because a norm has four.
    """
    out = torch.empty_like(x)
    channels = x.shape[-1]
    _add_norm[(x.numel() // channels,)](
        x, x if added is None else added, weight, weight if bias is None else bias, out, eps, channels,
        triton.next_power_of_2(channels), rms, added is not None, bias is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _chunk_sums(
    LOGITS, LARGEST, SUMS, inverse, row_stride,
    V: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per row and chunk of the vocabulary: the largest logit, the sum of exp(logit - largest)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = (
        tl.load(LOGITS + row * row_stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
        * inverse
    )
    largest = tl.max(x, 0)
    tl.store(LARGEST + row * CHUNKS + chunk, largest)
    finite = tl.where(largest == float("-inf"), 0.0, largest)  # of a chunk in which nothing is possible
    tl.store(SUMS + row * CHUNKS + chunk, tl.sum(tl.exp(x - finite), 0))


@triton.jit
def _draw(
    LOGITS, LARGEST, SUMS, NOISE, TOKEN, LOGPROB, inverse, row_stride,
    V: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per row: find the chunk into which the noise falls, and the token within it."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, PADDED)
    chunks = row * CHUNKS + number
    maxima = tl.load(LARGEST + chunks, mask=number < CHUNKS, other=float("-inf"))
    largest = tl.max(maxima, 0)
    sums = tl.load(SUMS + chunks, mask=number < CHUNKS, other=0.0) * tl.exp(maxima - largest)
    cumulated = tl.cumsum(sums.to(tl.float64), 0)
    total = tl.sum(sums.to(tl.float64), 0)
    target = tl.load(NOISE + row) * total
    chunk = tl.minimum(tl.sum((cumulated <= target).to(tl.int32), 0), CHUNKS - 1)
    rest = target - tl.sum(tl.where(number < chunk, sums.to(tl.float64), 0.0), 0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = (
        tl.load(LOGITS + row * row_stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
        * inverse
    )
    weight = tl.exp(x - largest)
    within = tl.cumsum(weight.to(tl.float64), 0)
    found = chunk * CHUNK + tl.sum((within <= rest).to(tl.int32), 0)
    # Sums of a chunk in two orders differ in their last bits: past its end, take its last possible token.
    found = tl.minimum(found, tl.max(tl.where(weight > 0, token, 0), 0))
    drawn = tl.sum(tl.where(token == found, x, 0.0), 0)
    tl.store(TOKEN + row, found.to(tl.int64))
    tl.store(LOGPROB + row, drawn - largest - tl.log(total).to(tl.float32))


def draw(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) int64 tokens and (B,) float32 log-probabilities, as `sampling.sample` does.

    Args:
        logits: (B, V) of any float dtype, contiguous within a row.
        temperature: above 0.
        noise: (B,) float64 in [0, 1).
    """
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    largest = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    sums, logprob = torch.empty_like(largest), torch.empty_like(largest[:, 0])
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    inverse, stride = 1 / temperature, logits.stride(0)
    _chunk_sums[(rows, chunks)](logits, largest, sums, inverse, stride, vocabulary, chunks, CHUNK)
    _draw[(rows,)](
        logits, largest, sums, noise.contiguous(), token, logprob, inverse, stride,
        vocabulary, chunks, triton.next_power_of_2(chunks), CHUNK,
    )  # fmt: skip
    return token, logprob
