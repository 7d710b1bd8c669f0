"""Attention within packed rows: by kernels of variable length if the GPU has them, or else by a mask.

Both are exact: a token attends to its own sequence up to itself, and to no other sequence. Kernels skip
what a mask would hide, and need no mask of (B, T, T).

Letters: B rows of a batch, T tokens of a row, D channels of a head, S runs (see `tokens.Packed`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from rlhf import parallel
from rlhf.models import families

logger = logging.getLogger(__name__)

Kernel = Callable[..., Any]  # torch's `varlen_attn`, or a function with its arguments and result

NAME = "varlen"  # of the attention function in transformers
LARGEST_HEAD, HEAD_STEP = 256, 8  # channels per head: the kernels' limit and granularity
OLDEST_GPU = (8, 0)  # compute capability: Ampere


def choose_attention(model: Any, dtype: str) -> None:
    """Let `model` attend within packed rows by kernels if that is possible, and log the choice.

    A model that attends by kernels can compute packed rows, and rows padded on the right.
    """
    found = obstacle([model], dtype)
    if found is None:
        use_kernel(model)
    logger.info(
        "packed rows: attention by %s",
        f"a block-diagonal mask ({found})" if found else "kernels of variable length",
    )


def obstacle(models: Sequence[Any], dtype: str) -> str | None:
    """Return why one of some models cannot attend by kernels of variable length, or None if all can."""
    found = [_obstacle(model.config, dtype, parallel.device()) for model in models]
    return next((reason for reason in found if reason), None)


def _obstacle(config: Any, dtype: str, device: torch.device) -> str | None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device.type != "cuda":
        return f"there are no kernels of variable length on {device.type}"
    if dtype == "fp32":
        return "kernels of variable length compute in 16 bits, dtype is fp32"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "kernels of variable length need a GPU of compute capability 8.0"
    if not families.attends_plainly(config):
        return f"a {config.model_type} model has a different attention"
    if head > LARGEST_HEAD or head % HEAD_STEP:
        return f"kernels of variable length do not support heads of {head} channels"
    return None


def use_kernel(model: Any, kernel: Kernel = varlen_attn) -> None:
    """Let `model` attend within packed rows by a kernel of variable length."""
    AttentionInterface.register(NAME, partial(attend, kernel))
    model.set_attn_implementation(NAME)


def uses_kernel(model: Any) -> bool:
    """Return whether a model attends by a kernel: it then reads boundaries and ignores masks."""
    return bool(model.config._attn_implementation == NAME)


def kernel_inputs(boundaries: Tensor, longest: int) -> dict[str, Any]:
    """Return what a model's forward hands on to `attend`: (S + 1,) int32 ends of runs, and the longest run."""
    ends = {f"cu_seq_lens_{side}": boundaries for side in "qk"}
    return {**ends, "max_length_q": longest, "max_length_k": longest}


def attend(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (B, T, heads, D) of the query's dtype, and None for the attention weights.

    It has nine parameters because transformers calls attention functions with these names.

    Args:
        query: (B, heads, T, D). `key` and `value` may have fewer heads; several of the query then share one.
        cu_seq_lens_q: (S + 1,) int32, `boundaries` of `tokens.Packed`; None for rows padded on the right.
        max_length_q: `longest` of `tokens.Packed`.
    """
    rows, heads = query.shape[0], query.shape[1]
    if cu_seq_lens_q is None:
        grouped = heads != key.shape[1]
        causal = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        return causal.transpose(1, 2), None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, heads, D)
    # The kernel's own option for shared heads differs between versions of torch.
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))  # (B * T, heads, D)
    out: Tensor = kernel(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),  # causal
    )
    return out.unflatten(0, (rows, -1)), None  # (B * T, heads, D) -> (B, T, heads, D)
