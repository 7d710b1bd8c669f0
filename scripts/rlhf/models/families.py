"""What depends on a model's family, decided from its configuration. How the engine decodes it: `generation.decoder`."""

from __future__ import annotations

from dataclasses import dataclass
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

# Families whose attention is a causal softmax of scaled scores and nothing else, unless a window is set.
PLAIN_ATTENTION = frozenset({"opt", "gpt_neox", "llama", "mistral", "qwen2"})

POSITION_OFFSET = 2  # row of position 0 in OPT's table of learned embeddings: nothing uses the rows before it


@dataclass(frozen=True)
class Layout:
    """Names of a family's weights, for the generation engine's copy of them."""

    layer: str  # prefix of a layer's weights
    qkv: tuple[str, ...]  # queries, keys and values: three layers, or one with those of each head in turn
    out: str
    up: tuple[str, ...]  # of an MLP with a gate: the gate, then the up projection
    down: str
    norms: tuple[str, str]  # before attention and before the MLP, or after them (OPT-350M)
    embedding: str
    norm: str
    positions: str = ""
    projections: tuple[str, str] = ("", "")  # from the embedding's width and back


_LLAMA_LAYOUT = Layout(
    layer="model.layers.{}.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    embedding="model.embed_tokens",
    norm="model.norm",
)
LAYOUTS = {
    "opt": Layout(
        layer="model.decoder.layers.{}.",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        embedding="model.decoder.embed_tokens",
        norm="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        projections=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    "llama": _LLAMA_LAYOUT,
    "mistral": _LLAMA_LAYOUT,
    "qwen2": _LLAMA_LAYOUT,
    "gpt_neox": Layout(
        layer="gpt_neox.layers.{}.",
        qkv=("attention.query_key_value",),
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"),
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
    ),
}

# Names of a causal language model's head, if it is not tied to the embeddings.
LANGUAGE_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})

# Attributes of configurations that multiply the logits by a factor. No tested family has one.
LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def capped(config: Any, logits: Any) -> Any:
    """Return logits (..., V), of the same dtype, as the family's own forward does: Gemma2 caps them."""
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


def has_layout(config: Any) -> bool:
    """Return whether the generation engine can compute a model: it knows its weights and its attention."""
    return config.model_type in LAYOUTS and attends_plainly(config)


def attends_plainly(config: Any) -> bool:
    """Return whether a model's attention is a causal softmax of scaled scores and nothing else."""
    return config.model_type in PLAIN_ATTENTION and getattr(config, "sliding_window", None) is None


def refuse_uneven(config: Any, processes: int) -> None:
    """Refuse a model whose heads or channels cannot be divided evenly between `processes` processes.

    Raises:
        UserError: they cannot, or the family has no layout; the text names the numbers or families that are
            possible.
    """
    field = f"rlhf.run.inference_tp_size = {processes}: "
    if not has_layout(config):
        window = getattr(config, "sliding_window", None)
        raise UserError(
            f"{field}a {config.model_type} model{f' with a sliding window of {window} tokens' if window else ''}"
            f" cannot be divided between processes (supported families: {', '.join(LAYOUTS)}): choose 1"
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
