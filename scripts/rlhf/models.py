"""Models: loading, what they compute for us, saving. Dropout is off, always.

Letters: B batch, T tokens of a sequence, A of a response, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from rlhf import families, lora, packing, parallel, sharding
from rlhf.config import Lora
from rlhf.errors import DataError, UserError, one_line
from rlhf.streams import Purpose, seed_of
from rlhf.tokens import Packed, Padded

transformers_logging.disable_progress_bar()  # one bar per load is noise
transformers_logging.set_verbosity_error()  # what a checkpoint lacks is looked at below, and refused


def load_actor(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a causal language model.

    Raises:
        DataError: weights are missing, unexpected or of another shape; they are named. Or its weights or its
            config.json cannot be read.
        UserError: it gives scores, not text, or scales its logits as no family does that is supported.
    """
    config = _config(path)
    families.refuse_scaled_logits(config)
    kinds = config.architectures or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(f"{path} is a reward model or a critic: it gives scores, not replies; give an actor")
    return _load(AutoModelForCausalLM, path, dtype, allowed=set())


def load_scorer(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a reward model: a sequence classifier with one label.

    Raises:
        DataError: as `load_actor`.
    """
    return _load(AutoModelForSequenceClassification, path, dtype, allowed=set(), num_labels=1)


def new_scorer(path: Path, dtype: torch.dtype, pad_id: int, seed: int) -> PreTrainedModel:
    """Make a reward model from a language model, with a fresh head: normal, sd 1/sqrt(h + 1).

    Raises:
        DataError: as `load_actor`.
    Source: Stiennon et al. 2020, appendix; `notes/ppo.md` keeps the peers' values.
    """
    model = _load(
        AutoModelForSequenceClassification, path, dtype,
        allowed={"score.weight"} | families.LANGUAGE_HEADS, num_labels=1, pad_token_id=pad_id,
    )  # fmt: skip
    head: Tensor = model.score.weight
    with sharding.whole([head], changed=True), torch.no_grad():
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed_of(seed, Purpose.HEAD)))
        head.copy_(noise / (head.shape[1] + 1) ** 0.5)
    return model


def _load(
    kind: Any, path: Path, dtype: torch.dtype | str, allowed: set[str], **options: Any
) -> PreTrainedModel:
    config = _config(path, **options)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    try:
        model, info = kind.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"the weights in {path} cannot be read: {one_line(error)}") from None
    found = {what: sorted(map(str, set(info[what]) - allowed)) for what in info if info[what]}
    if wrong := {what: names for what, names in found.items() if names}:
        raise DataError(f"{path} does not hold the weights that its config.json says: {wrong}")
    return model


def _config(path: Path, **options: Any) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise DataError(f"{path / 'config.json'} is not that of a model: {one_line(error)}") from None
    if not isinstance(kinds := config.architectures, list | None):
        raise DataError(f"{path / 'config.json'}: architectures = {kinds!r}: should be a list of names")
    return config


def refuse_too_long(path: Path, tokens: int, fields: str) -> None:
    """Refuse sequences that are longer than the model at `path` has positions for.

    Raises:
        UserError: with the `fields` of the configuration that ask for so many tokens.
    """
    positions = getattr(_config(path), "max_position_embeddings", None)  # ALiBi needs none
    if positions is not None and tokens > positions:
        raise UserError(
            f"{fields}: sequences of up to {tokens} tokens, but {path} has {positions} positions: lower"
            f" {'it' if ' ' not in fields else 'one of them'}, or choose another model"
        )


def hidden_inputs(model: Any, batch: Padded | Packed) -> dict[str, Any]:
    """Return a model's inputs; positions count a sequence's own tokens, whatever lies beside it."""
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions}
    if isinstance(batch, Packed) and packing.by_kernel(model):
        ends = {f"cu_seq_lens_{side}": batch.boundaries for side in "qk"}
        return {**inputs, **ends, "max_length_q": batch.longest, "max_length_k": batch.longest}
    return {**inputs, "attention_mask": batch.attention}


def response_logits(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N, V) float32: logits that predict the N tokens where `labels` (B, T) is True, over temperature.

    The vocabulary is only looked at where it counts: logits of prompts and padding are not made.
    """
    hidden = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[:, :-1][labels[:, 1:]])
    return families.capped(model.config, logits).float() / temperature


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (N,) float32: log-probability of each of (N,) tokens under (N, V) logits."""
    return -F.cross_entropy(logits, tokens, reduction="none")


def response_logprobs(model: Any, batch: Padded | Packed, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) float32: log-probability of each of the N tokens where `labels` (B, T) is True."""
    return token_logprobs(response_logits(model, batch, labels, temperature), batch.ids[labels])


def response_values(model: Any, batch: Padded, labels: Tensor) -> Tensor:
    """Return (N,) float32: a critic's value of the state before each token where `labels` (B, T) is True."""
    return token_values(model, batch)[:, :-1][labels[:, 1:]]


def token_values(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (B, T) float32: a scorer's output at every token."""
    hidden = model.base_model(**hidden_inputs(model, batch), use_cache=False).last_hidden_state
    values: Tensor = model.score(hidden)[..., 0].float()
    return values


def scores(model: Any, batch: Padded | Packed) -> Tensor:
    """Return (N,) float32: a scorer's output at the last real token of each sequence."""
    return token_values(model, batch).flatten()[batch.ends]


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, temperature: float = 1.0
) -> None:
    """Write a plain Hugging Face directory: safetensors, whole tokenizer, generation settings.

    All processes call it, rank 0 writes. A model that ZeRO-3 holds is written a file at a time.

    Args:
        temperature: at which its replies were drawn and judged, which `generate` draws at then, too.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0, temperature=temperature,
        )  # fmt: skip
    if parallel.rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(path)
    if not sharding.is_sharded(model):
        if parallel.rank() == 0:
            model.save_pretrained(path, state_dict=_published(model))
        return
    if parallel.rank() == 0:
        _save_settings(model, path)
    sharding.write_shards(model, path)


def _published(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return the weights with adapters merged, or None where there are none."""
    adapted = {f"{name}.weight": layer for name, layer in lora.layers(model).items()}
    if not adapted:
        return None
    with torch.no_grad():
        return {
            name: adapted[name].merged() if name in adapted else tensor
            for name, tensor in model.state_dict().items()
            if not lora.is_adapter(name)
        }


def save_adapter(model: PreTrainedModel, config: Lora, base: str, path: Path) -> None:
    """Write the adapter as PEFT reads it; all processes call it, rank 0 writes.

    Args:
        base: where the model without adapters lies.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with sharding.whole([parameter]):
                key = f"{name}.weight" if lora.is_adapter(name) else name
                tensors[f"base_model.model.{key}"] = parameter.detach().cpu().clone().contiguous()
    if parallel.rank() == 0:
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        settings = json.dumps(lora.peft_config(model, config, base), indent=2, sort_keys=True)
        (path / "adapter_config.json").write_text(settings + "\n")


def _save_settings(model: PreTrainedModel, path: Path) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in evaluation mode; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
