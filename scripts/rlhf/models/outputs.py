"""What is computed with models: logits, log-probs, values and scores.

Letters: B rows of a batch, T tokens of a row, N selected tokens or sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
LOGITS_OF_KERNEL = 16384  # the same, where a kernel reads them in 16 bits

transformers_logging.disable_progress_bar()  # a bar for each model that is loaded is noise
transformers_logging.set_verbosity_error()  # `loading` checks for missing and unexpected weights itself


def hidden_inputs(model: Any, batch: Padded | Packed) -> dict[str, Any]:
    """Return the arguments of a model's forward: ids and positions, (B, T) int64, and how to attend."""
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions}
    if isinstance(batch, Packed) and packing.uses_kernel(model):
        return inputs | packing.kernel_inputs(batch.boundaries, batch.longest)
    attention = batch.attention  # made at each look, and of packed rows (B, 1, T, T)
    assert attention is None or not packing.uses_kernel(model), "kernels do not see padding before tokens"
    return {**inputs, "attention_mask": attention}


def last_hidden(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (B, T, H) of the model's dtype: the last hidden state of each token."""
    graphs = getattr(model, "body_graphs", None)
    if graphs is not None and graphs.fits(batch):
        replayed: Tensor = graphs(batch)
        return replayed
    hidden: Tensor = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state
    return hidden


def response_logits(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N, V) float32: logits / temperature of the N tokens where `labels` (B, T) bool is True.

    Logits of prompts and padding are not computed, which saves memory.
    """
    return _divided(_logits(model, _predicting(model, batch, labels)), temperature)


def response_logprobs(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) float32: log-prob of each of the N tokens where `labels` (B, T) bool is True."""
    return _logprobs(model, batch, labels, temperature, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: Any, batch: Padded | Packed, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return what `response_logprobs` does, and the entropy before each token, (N,) float32 without gradients."""
    logprobs, entropies = _logprobs(model, batch, labels, temperature, with_entropy=True)
    return logprobs, entropies


def _logprobs(
    model: Any, batch: Padded | Packed, labels: Tensor, temperature: float, *, with_entropy: bool
) -> Sequence[Tensor]:
    """Return log-probs, and entropies `with_entropy`.

    Few tokens have their logits at a time: they are computed in chunks, and again in the backward pass. Under
    ZeRO-3 they are computed at once, because processes with different numbers of chunks would gather the
    weights of the head in different orders.
    """
    tokens = batch.ids[labels]  # (N,)
    predicting = _predicting(model, batch, labels)  # (N, H)

    def chunk(hidden: Tensor, of: Tensor) -> Sequence[Tensor]:
        logits = _logits(model, hidden)
        if logits.is_cuda:
            # Imported here: a CPU build of torch has no Triton.
            from rlhf.models import kernels  # noqa: PLC0415

            return kernels.logprobs(logits, of, temperature)
        wide = _divided(logits, temperature)
        return token_logprobs(wide, of), *([entropy(wide.detach())] if with_entropy else [])

    size = LOGITS_OF_KERNEL if predicting.is_cuda else LOGITS
    if len(tokens) <= size or is_sharded(model):
        return chunk(predicting, tokens)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    parts = zip(predicting.split(size), tokens.split(size), strict=True)
    found = [checkpoint(chunk, hidden, of, **options) for hidden, of in parts]
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _predicting(model: Any, batch: Padded | Packed, labels: Tensor) -> Tensor:
    """Return (N, H): the hidden state before each token where `labels` is True; it predicts the token."""
    return last_hidden(model, batch)[:, :-1][labels[:, 1:]]


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Return (N, V) of the model's dtype, of (N, H)."""
    logits: Tensor = families.capped(model.config, model.get_output_embeddings()(hidden))
    return logits


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """Return (N, V) float32: logits over a temperature."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (N,) float32: log-prob of each of (N,) int64 tokens under (N, V) float32 logits."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of distributions in nats, (...) float32, from (..., V) float32 logits."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def response_values(model: Any, batch: Padded | Packed, labels: Tensor) -> Tensor:
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
