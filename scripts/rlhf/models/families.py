"""Everything that depends on a model's family, decided from its configuration."""

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

# Those whose outputs are added to the hidden state. The others read it, and their outputs are heads or
# channels of the MLP, which can be divided between processes.
WRITERS = {
    "opt": ("out_proj", "fc2"),
    "gpt_neox": ("dense", "dense_4h_to_h"),
    "llama": ("o_proj", "down_proj"),
    "mistral": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
}

# Families whose attention is a causal softmax of scaled scores and nothing else, unless a window is set.
PLAIN_ATTENTION = frozenset({"opt", "gpt_neox", "llama", "qwen2"})

# Attribute of attention modules with the number of heads, for families that do not infer it from shapes.
HEAD_COUNT = {"opt": "num_heads"}

# Names of a causal language model's head, if it is not tied to the embeddings.
LANGUAGE_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})

# Attributes of configurations with a factor of the logits. No tested family has one.
LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def capped(config: Any, logits: Any) -> Any:
    """Return a head's logits (..., V) as the family's own forward returns them: Gemma2 caps them."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def refuse_scaled_logits(config: Any) -> None:
    """Refuse a family that multiplies its head's logits by a factor, which our forward would leave out.

    Raises:
        UserError: the configuration has such a factor.
    """
    for name in LOGIT_FACTORS:
        if (factor := getattr(config, name, None)) not in (None, 1):
            raise UserError(
                f"{config.model_type} models scale their logits ({name} = {factor}), which is not supported:"
                " choose a model of another family"
            )


def linear_layers(config: Any) -> tuple[str, ...]:
    """Return the names of the linear layers of a decoder layer, the default targets of LoRA.

    Raises:
        DataError: the family is unknown.
    """
    try:
        return LINEAR[config.model_type]
    except KeyError:
        raise DataError(
            f"LoRA's targets of a {config.model_type} model are not known (known families: {', '.join(LINEAR)}):"
            " name them in lora.targets, for example [q_proj, v_proj]"
        ) from None


def attends_plainly(config: Any) -> bool:
    """Return whether a model's attention is a causal softmax and nothing else."""
    return config.model_type in PLAIN_ATTENTION and getattr(config, "sliding_window", None) is None


def refuse_uneven(config: Any, processes: int) -> None:
    """Refuse a model whose heads or channels cannot be divided evenly between `processes` processes.

    Raises:
        UserError: with the numbers of processes that are possible.
    """
    field = f"rlhf.run.inference_tp_size = {processes}: "
    if config.model_type not in WRITERS:
        raise UserError(
            f"{field}a {config.model_type} model cannot be divided between processes (supported families:"
            f" {', '.join(WRITERS)}): choose 1"
        )
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "key-value heads": getattr(config, "num_key_value_heads", heads),
        "MLP channels": getattr(config, "ffn_dim", None) or config.intermediate_size,
    }
    if uneven := [f"{count} {what}" for what, count in counts.items() if count % processes]:
        possible = [str(n) for n in range(1, heads + 1) if not any(count % n for count in counts.values())]
        raise UserError(
            f"{field}the actor's {' and '.join(uneven)} cannot be divided evenly: choose one of"
            f" {', '.join(possible)}"
        )
