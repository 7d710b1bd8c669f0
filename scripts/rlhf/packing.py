"""Attention within packed rows: kernels of variable length where there are some, a mask elsewhere.

Both are exact: a token sees its own sequence up to itself, and nothing of its neighbours. Kernels do
not look at what a mask would hide, and need no mask of (B, T, T).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from rlhf import families, parallel

logger = logging.getLogger(__name__)

NAME = "varlen"  # by which transformers knows it
LARGEST_HEAD, HEAD_STEP = 256, 8  # channels of a head that the kernels can do
OLDEST_GPU = (8, 0)  # compute capability: Ampere


def choose(model: Any, dtype: str) -> None:
    """Let `model` attend within packed rows by kernels if they can do it, and say by what it does.

    From then on a model that does is for packed rows only.
    """
    why_not = _why_not(model.config, dtype, parallel.device())
    if why_not is None:
        use(model, varlen_attn)
    logger.info(
        "packed rows: attention by %s",
        f"a block-diagonal mask ({why_not})" if why_not else "kernels of variable length",
    )


def _why_not(config: Any, dtype: str, device: torch.device) -> str | None:
    """Return why kernels of variable length cannot do this, or None if they can."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device.type != "cuda":
        return f"there are no kernels of variable length on {device.type}"
    if dtype == "fp32":
        return "kernels of variable length compute in 16 bits, dtype is fp32"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "kernels of variable length need a GPU of compute capability 8.0"
    if not families.attends_plainly(config):
        return f"a {config.model_type} model has attention of its own kind"
    if head > LARGEST_HEAD or head % HEAD_STEP:
        return f"kernels of variable length cannot do heads of {head} channels"
    return None


def use(model: Any, kernel: Callable[..., Tensor]) -> None:
    """Let `model` attend within packed rows by a kernel that is called as torch's `varlen_attn`."""
    AttentionInterface.register(NAME, partial(attend, kernel))
    model.set_attn_implementation(NAME)


def by_kernel(model: Any) -> bool:
    """Return whether a model attends by a kernel, from boundaries: it looks at no mask."""
    return bool(model.config._attn_implementation == NAME)


def attend(
    kernel: Callable[..., Tensor], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: None, *, scaling: float, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return (B, T, H, D): what transformers asks of an attention function.

    Args:
        query: (B, H, T, D); `key` and `value` may have fewer heads, each for as many of the query's.
        cu_seq_lens_q: `tokens.Packed.boundaries`; `max_length_q` its `longest`.
    """
    rows, heads = query.shape[0], query.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    # The kernel's own switch for fewer heads differs between torch's versions.
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out = kernel(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(-1, 0),  # causal
    )  # fmt: skip
    return out.unflatten(0, (rows, -1)), None
