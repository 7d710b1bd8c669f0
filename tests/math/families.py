"""Tiny models with random weights of every family, far from uniform in what they predict."""

from __future__ import annotations

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64, **IDS}
GROUPED = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
OPT = {"ffn_dim": 64, "num_attention_heads": 2, "dropout": 0.1, "attention_dropout": 0.1, "init_std": 0.3}

FAMILIES = {
    "opt": lambda: OPTForCausalLM(OPTConfig(word_embed_proj_dim=32, **OPT, **COMMON)),
    # As OPT-350M: norms after the layers, embeddings narrower than the model, projected in and out.
    "opt-350m": lambda: OPTForCausalLM(
        OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **OPT, **COMMON)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **GROUPED, **COMMON)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **GROUPED, **COMMON)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **GROUPED, **COMMON)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            num_attention_heads=2,
            intermediate_size=64,
            initializer_range=0.3,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            **COMMON,
        )
    ),
}


def tiny(family: str):
    """Return a tiny causal language model of a family, in training's numbers but without dropout on."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return FAMILIES[family]().eval()
