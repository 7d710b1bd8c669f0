"""Attention of the generation engine, over a cache that every row fills from its beginning.

On a GPU a Triton kernel decodes; elsewhere, and for what it cannot do, torch's attention with a mask.

Letters: B rows, N new prompts, P tokens of a prompt, C places of the cache, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128, 256)  # that the kernel can do: powers of two, as Triton's ranges are


class Cache:
    """Keys and values of all layers, allocated once: (layers, B, key-value heads, C, D) each."""

    def __init__(self, decoder: Any, rows: int, places: int) -> None:
        shape = (len(decoder.layers), rows, decoder.kv_heads, places, decoder.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.values = torch.zeros_like(self.keys)


def has_kernel(device: torch.device, head_dim: int) -> bool:
    """Return whether the Triton kernel decodes on a device; torch's CUDA builds come with Triton."""
    return device.type == "cuda" and head_dim in HEAD_DIMS


def prefill(
    cache: Cache, layer: int, rows: Tensor, qkv: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """Attend causally within new prompts, and write their keys and values to the cache.

    Args:
        rows: (N,) int64, the rows of the cache that the prompts get.
        qkv: queries (N, P, heads, D), keys and values (N, P, key-value heads, D); padding is on the right.

    Returns:
        (N, P, heads, D).
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
        qkv: queries (B, heads, D), keys and values (B, key-value heads, D).

    Returns:
        (B, heads, D).
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
    """Return (B, heads, D): the reference of the kernel, with one layer of the cache, (B, heads, C, D)."""
    q, k, v = qkv
    rows = torch.arange(len(q), device=q.device)
    keys[rows, :, lengths], values[rows, :, lengths] = k, v
    width = keys.shape[2]
    if q.device.type == "cpu":  # a look at the lengths costs nothing here, and most places are empty
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
