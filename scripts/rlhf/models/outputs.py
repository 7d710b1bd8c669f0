"""What is computed with models: logits, log-probs, values and scores.

Letters: B rows of a batch, T tokens of a row, N selected tokens or sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rlhf.data.tokens import Packed, Padded
from rlhf.models import families, packing

transformers_logging.disable_progress_bar()  # a bar for each model that is loaded is noise
transformers_logging.set_verbosity_error()  # `loading` checks for missing and unexpected weights itself


def hidden_inputs(model: Any, batch: Padded | Packed) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward: ids and positions (B, T), and how to attend."""
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions}
    if isinstance(batch, Packed) and packing.uses_kernel(model):
        ends = {f"cu_seq_lens_{side}": batch.boundaries for side in "qk"}
        return {**inputs, **ends, "max_length_q": batch.longest, "max_length_k": batch.longest}
    return {**inputs, "attention_mask": batch.attention}


def response_logits(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N, V) float32: logits / temperature of the N tokens where `labels` (B, T) bool is True.

    Logits of prompts and padding are not computed, which saves memory.
    """
    hidden = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state  # (B, T, H)
    # The hidden state before a token predicts it.
    predicting = hidden[:, :-1][labels[:, 1:]]  # (N, H)
    logits: Tensor = model.get_output_embeddings()(predicting)  # (N, V)
    return families.capped(model.config, logits).float() / temperature


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (N,) float32: log-prob of each of (N,) int64 tokens under (N, V) float32 logits."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def response_logprobs(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) float32: log-prob of each of the N tokens where `labels` (B, T) bool is True."""
    return token_logprobs(response_logits(model, batch, labels, temperature), batch.ids[labels])


def response_values(model: Any, batch: Padded, labels: Tensor) -> Tensor:
    """Return (N,) float32: a critic's value before each of the N tokens where `labels` (B, T) bool is True."""
    return token_values(model, batch)[:, :-1][labels[:, 1:]]  # (B, T) -> (N,)


def token_values(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (B, T) float32: a scorer's output at every token."""
    hidden = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state  # (B, T, H)
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
