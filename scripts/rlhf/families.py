"""What depends on a model's family, decided from its configuration: here and nowhere else."""

from __future__ import annotations

from typing import Any

from rlhf.errors import DataError, UserError

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

# Those of them that add to the hidden state. The others read it; their outputs are heads, one after
# another, or channels of the MLP: several processes can have some of them each.
WRITERS = {
    "opt": ("out_proj", "fc2"),
    "gpt_neox": ("dense", "dense_4h_to_h"),
    "llama": ("o_proj", "down_proj"),
    "mistral": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
}

# Those whose attention is a causal softmax of scaled scores and nothing else, if no window is set.
PLAIN_ATTENTION = frozenset({"opt", "gpt_neox", "llama", "qwen2"})

# An attribute of attention modules that counts heads, where they do not ask the shape of what they get.
HEAD_COUNT = {"opt": "num_heads"}

# What a causal language model calls its head, if the embeddings are not tied to it.
LANGUAGE_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})


# Factors of logits that families other than those tested have, by the attribute of their configuration.
LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def capped(config: Any, logits: Any) -> Any:
    """Return a head's logits as the family's own forward gives them out: Gemma2's are capped."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def refuse_scaled_logits(config: Any) -> None:
    """Refuse a family whose logits are its head's times a factor: training would take them without it.

    Raises:
        UserError: with the attribute that says so.
    """
    for name in LOGIT_FACTORS:
        if (factor := getattr(config, name, None)) not in (None, 1):
            raise UserError(
                f"{config.model_type} models scale their logits ({name} = {factor}), which is not supported:"
                " choose a model of another family"
            )


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


def attends_plainly(config: Any) -> bool:
    """Return whether a model's attention is a causal softmax and nothing else."""
    return config.model_type in PLAIN_ATTENTION and getattr(config, "sliding_window", None) is None


def refuse_uneven(config: Any, processes: int) -> None:
    """Refuse a model that `processes` processes cannot have equal parts of, by heads and channels.

    Raises:
        UserError: with what would do.
    """
    where = f"rlhf.run.inference_tp_size = {processes}: "
    if config.model_type not in WRITERS:
        raise UserError(
            f"{where}a {config.model_type} model cannot be cut (those that can: {', '.join(WRITERS)}): choose 1"
        )
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "key-value heads": getattr(config, "num_key_value_heads", heads),
        "MLP channels": getattr(config, "ffn_dim", None) or config.intermediate_size,
    }
    if uneven := [f"{count} {what}" for what, count in counts.items() if count % processes]:
        fits = [str(n) for n in range(1, heads + 1) if not any(count % n for count in counts.values())]
        raise UserError(
            f"{where}the actor's {' and '.join(uneven)} cannot be shared out evenly; choose one of"
            f" {', '.join(fits)}"
        )
