"""What is computed with models: logits, log-probs, values and scores.

Letters: B rows of a batch, T tokens of a row, N selected tokens or sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from rlhf.data.tokens import Packed, Padded
from rlhf.models import families, packing
from rlhf.models.sharding import is_sharded

LOGITS = 8192  # tokens whose logits exist at a time; in 32 bits, 1.6 GB at a vocabulary of 50,000

transformers_logging.disable_progress_bar()  # a bar for each model that is loaded is noise
transformers_logging.set_verbosity_error()  # `loading` checks for missing and unexpected weights itself


def hidden_inputs(model: Any, batch: Padded | Packed) -> dict[str, Any]:
    """Return the arguments of a model's forward: ids and positions, (B, T) int64, and how to attend."""
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions}
    if isinstance(batch, Packed) and packing.uses_kernel(model):
        return inputs | packing.kernel_inputs(batch.boundaries, batch.longest)
    return {**inputs, "attention_mask": batch.attention}


def last_hidden(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (B, T, H) of the model's dtype: the last hidden state of each token."""
    graphs = getattr(model, "body_graphs", None)
    if graphs is not None and isinstance(batch, Packed) and graphs.fits(batch):
        replayed: Tensor = graphs(batch)
        return replayed
    hidden: Tensor = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state
    return hidden


def response_logits(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N, V) float32: logits / temperature of the N tokens where `labels` (B, T) bool is True.

    Logits of prompts and padding are not computed, which saves memory.
    """
    return _logits(model, _predicting(model, batch, labels), temperature)


def per_response_token(
    model: Any,
    batch: Padded | Packed,
    labels: Tensor,
    temperature: float,
    compute: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return (..., N): what `compute` makes of the logits of the N tokens where `labels` (B, T) bool is True.

    At most `LOGITS` tokens have their logits at a time: they are computed in chunks, and again in the backward
    pass. Under ZeRO-3 they are computed at once, because processes with different numbers of chunks would
    gather the weights of the head in different orders.

    Args:
        compute: logits (n, V) float32 and tokens (n,) int64 -> (..., n).
    """
    tokens = batch.ids[labels]  # (N,)
    if len(tokens) <= LOGITS or is_sharded(model):
        return compute(response_logits(model, batch, labels, temperature), tokens)

    def chunk(hidden: Tensor, of: Tensor) -> Tensor:
        return compute(_logits(model, hidden, temperature), of)

    predicting = _predicting(model, batch, labels)  # (N, H)
    parts = zip(predicting.split(LOGITS), tokens.split(LOGITS), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(chunk, hidden, of, **options) for hidden, of in parts], -1)


def _predicting(model: Any, batch: Padded | Packed, labels: Tensor) -> Tensor:
    """Return (N, H): the hidden state before each token where `labels` is True; it predicts the token."""
    return last_hidden(model, batch)[:, :-1][labels[:, 1:]]


def _logits(model: Any, hidden: Tensor, temperature: float) -> Tensor:
    """Return (N, V) float32 of (N, H)."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # (N, V)
    return families.capped(model.config, logits).float() / temperature


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (N,) float32: log-prob of each of (N,) int64 tokens under (N, V) float32 logits."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def response_logprobs(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) float32: log-prob of each of the N tokens where `labels` (B, T) bool is True."""
    return per_response_token(model, batch, labels, temperature, token_logprobs)


def response_values(model: Any, batch: Padded, labels: Tensor) -> Tensor:
    """Return (N,) float32: a critic's value before each of the N tokens where `labels` (B, T) bool is True."""
    return token_values(model, batch)[:, :-1][labels[:, 1:]]  # (B, T) -> (N,)


def token_values(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (B, T) float32: a scorer's output at every token."""
    hidden = last_hidden(model, batch)  # (B, T, H)
    values: Tensor = model.score(hidden)[..., 0].float()  # (B, T, 1) -> (B, T)
    return values


def scores(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (N,) float32: a scorer's output at the last real token of each sequence."""
    return token_values(model, batch).flatten()[batch.ends]  # (B, T) -> (B * T,) -> (N,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute without gradients and in evaluation mode within the block; restore the mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
