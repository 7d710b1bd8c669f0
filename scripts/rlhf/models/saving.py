"""Saving models as plain Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf import parallel
from rlhf.config.training import Lora
from rlhf.models import lora, sharding


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, temperature: float = 1.0
) -> None:
    """Write a plain Hugging Face directory: safetensors, tokenizer, generation settings.

    All processes call it, rank 0 writes. Of a model that ZeRO-3 shards, one file at a time is gathered.

    Args:
        temperature: of sampling in training, which becomes the default of `generate`.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
            top_k=0,
            temperature=temperature,
        )
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
    """Return name -> weight with adapters merged, or None if the model has no adapters."""
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
    """Write a model's adapters in PEFT's format. All processes call it, rank 0 writes.

    Args:
        base: path of the model without adapters.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with sharding.gathered_parameters([parameter]):
                key = f"{name}.weight" if lora.is_adapter(name) else name
                tensors[f"base_model.model.{key}"] = parameter.detach().cpu().clone().contiguous()
    if parallel.rank() == 0:
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        settings = json.dumps(lora.peft_config(model, config, base), indent=2, sort_keys=True)
        (path / "adapter_config.json").write_text(settings + "\n")


def _save_settings(model: PreTrainedModel, path: Path) -> None:
    """Write the settings that `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)
