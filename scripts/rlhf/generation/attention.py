"""Attention of the generation engine. A row of the cache holds one sequence, from place 0 on, without gaps.

`prefill` computes the attention of whole prompts, with torch. `decode` computes that of one new token per
row: with a Triton kernel on CUDA if the kernel supports the head size, otherwise with torch and a mask.

Letters: B rows of the cache, N new prompts, P tokens of the longest of them, C places (for a token each) of
a row, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128, 256)  # that the kernel supports: powers of two, as Triton's ranges are


class Cache:
    """Keys and values of all layers, allocated once.

    Each is (layers, B, key-value heads, C, D), of the decoder's dtype.
    """

    def __init__(self, decoder: Any, rows: int, places: int) -> None:
        shape = (len(decoder.layers), rows, decoder.kv_heads, places, decoder.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.values = torch.zeros_like(self.keys)


def has_kernel(device: torch.device, head_dim: int) -> bool:
    """Return whether `decode` uses the Triton kernel; torch's CUDA builds come with Triton."""
    return device.type == "cuda" and head_dim in HEAD_DIMS


def prefill(
    cache: Cache, layer: int, rows: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Attend causally within new prompts, and write their keys and values to the cache.

    Padding is on the right, where causality hides it. `decode` overwrites its keys, one place at a time.

    Args:
        rows: (N,) int64, the rows of the cache that the prompts get.
        qkv: queries (N, P, heads, D), keys and values (N, P, key-value heads, D), of the cache's dtype.

    Returns:
        (N, P, heads, D) of the same dtype.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)  # (N, heads, P, D)
    cache.keys[layer, rows, :, : k.shape[2]] = k
    cache.values[layer, rows, :, : v.shape[2]] = v
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(
        1, 2
    )


def decode(
    cache: Cache, layer: int, lengths: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Attend from one new token of every row, and write its key and value to the cache.

    Args:
        lengths: (B,) int64, tokens before the new one.
        qkv: queries (B, heads, D), keys and values (B, key-value heads, D), of the cache's dtype.

    Returns:
        (B, heads, D) of the same dtype.
    """
    keys, values = cache.keys[layer], cache.values[layer]  # (B, key-value heads, C, D)
    if has_kernel(keys.device, keys.shape[-1]):
        # Imported here: a CPU build of torch has no Triton.
        from rlhf.generation import kernels  # noqa: PLC0415

        return kernels.decode(keys, values, lengths, qkv, scale)
    return decode_by_mask(keys, values, lengths, qkv, scale)


def decode_by_mask(
    keys: Tensor, values: Tensor, lengths: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Do in torch what `decode` does: the kernel's reference. Arguments and result are those of `decode`.

    Args:
        keys, values: (B, key-value heads, C, D), one layer of the cache, written in place.
    """
    q, k, v = qkv
    rows = torch.arange(len(q), device=q.device)
    keys[rows, :, lengths], values[rows, :, lengths] = k, v
    width = keys.shape[2]
    if q.device.type == "cpu":  # here the host reads lengths at no cost, and skips empty places
        width = int(lengths.max()) + 1
    visible = torch.arange(width, device=q.device) <= lengths[:, None]  # (B, width)
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[:, :, :width],
        values[:, :, :width],
        attn_mask=visible[:, None, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[:, :, 0]
