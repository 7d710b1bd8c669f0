from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

BOS, PAD, EOS, VOCABULARY = 0, 1, 2, 64


@pytest.fixture(scope="session")
def actor():
    """A tiny OPT with random weights, large enough that its predictions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.3,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        return OPTForCausalLM(config).eval()


@pytest.fixture(scope="session")
def actor_path(actor, tmp_path_factory):
    path = tmp_path_factory.mktemp("actor")
    actor.save_pretrained(path)
    return path


@pytest.fixture
def sequences():
    """Return a function: lengths -> random sequences of ordinary tokens that begin with BOS."""

    def make(*lengths, seed=0):
        draw = np.random.default_rng(seed)
        return [np.r_[BOS, draw.integers(3, VOCABULARY, n - 1)].astype(np.int32) for n in lengths]

    return make
