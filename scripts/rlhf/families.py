"""What depends on a model's family, decided from its configuration: here and nowhere else."""

from __future__ import annotations

from typing import Any

from rlhf.errors import DataError

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The linear layers of a decoder layer, by `model_type`.
LINEAR = {
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
}

# What a causal language model calls its head, if the embeddings are not tied to it.
LANGUAGE_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})


def linear_layers(config: Any) -> tuple[str, ...]:
    """Return the names of the linear layers of a decoder layer.

    Raises:
        DataError: the family is not known.
    """
    try:
        return LINEAR[config.model_type]
    except KeyError:
        raise DataError(
            f"LoRA's targets of a {config.model_type} model are not known (known: {', '.join(LINEAR)}):"
            " name them in lora.targets, as in [q_proj, v_proj]"
        ) from None
