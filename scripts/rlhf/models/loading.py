"""Loading models: with exactly the weights that config.json describes, and without dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.data.streams import Purpose, seed_of
from rlhf.errors import DataError, UserError, one_line
from rlhf.models import families, sharding


def load_actor(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Return a causal language model.

    Args:
        dtype: of all weights; "auto": as they are saved.

    Raises:
        DataError: weights or config.json cannot be read, or weights are missing, unexpected or of another
            shape; the text names them.
        UserError: the model gives scores, not text, or scales its logits, which is not supported.
    """
    config = _config(path)
    families.refuse_scaled_logits(config)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(
            f"{path} is a reward model or a critic: it gives scores, not responses; give an actor"
        )
    return _load(AutoModelForCausalLM, path, dtype, allowed=set())


def load_scorer(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return a reward model: a sequence classifier with one label, and weights of `dtype`.

    Raises:
        DataError: as `load_actor`.
    """
    return _load(AutoModelForSequenceClassification, path, dtype, allowed=set(), num_labels=1)


def new_scorer(path: Path, dtype: torch.dtype, pad_id: int, seed: int) -> PreTrainedModel:
    """Return a reward model with a language model's weights and a new head (1, H).

    The head is drawn from a normal distribution with sd 1 / sqrt(H + 1), a function of the seed alone.

    Raises:
        DataError: as `load_actor`.

    Source: Stiennon et al., Learning to summarize from human feedback, 2020, appendix.
    """
    model = _load(
        AutoModelForSequenceClassification,
        path,
        dtype,
        allowed={"score.weight"} | families.LANGUAGE_HEADS,
        num_labels=1,
        pad_token_id=pad_id,
    )
    head = model.get_parameter("score.weight")  # (1, H)
    with sharding.gathered_parameters([head], changed=True), torch.no_grad():
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed_of(seed, Purpose.HEAD)))
        head.copy_(noise / (head.shape[1] + 1) ** 0.5)
    return model


def _load(
    auto_class: Any, path: Path, dtype: torch.dtype | str, allowed: set[str], **options: Any
) -> PreTrainedModel:
    """Load a model without dropout; only the `allowed` weights may be missing or unexpected."""
    config = _config(path, **options)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    try:
        model, info = auto_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"the weights in {path} cannot be read: {one_line(error)}") from None
    mismatches = {
        mistake: sorted(map(str, set(info[mistake]) - allowed)) for mistake in info if info[mistake]
    }
    if mismatches := {mistake: names for mistake, names in mismatches.items() if names}:
        raise DataError(f"{path} does not have the weights that its config.json describes: {mismatches}")
    return model


def _config(path: Path, **options: Any) -> Any:
    """Return a model's configuration.

    Raises:
        DataError: config.json cannot be read, or is not that of a model.
    """
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(f"{path / 'config.json'} is not that of a model: {one_line(error)}") from None
    if not isinstance(names := config.architectures, list | None):
        raise DataError(f"{path / 'config.json'}: architectures = {names!r}: should be a list of names")
    return config


def refuse_too_long(path: Path, tokens: int, fields: str) -> None:
    """Refuse sequences of `tokens` tokens if the model at `path` has fewer positions.

    Args:
        fields: the fields of the configuration that set the length, for the message.

    Raises:
        UserError: the model has fewer positions.
        DataError: its config.json cannot be read.
    """
    positions = getattr(_config(path), "max_position_embeddings", None)  # models with ALiBi have no limit
    if positions is not None and tokens > positions:
        raise UserError(
            f"{fields}: sequences of up to {tokens} tokens, but {path} has {positions} positions: lower"
            f" {'it' if ' ' not in fields else 'one of them'}, or choose another model"
        )
