"""A built-in model, which needs no account and no network: an untrained OPT of any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed

from rlhf.config.catalog import HEAD_SIZE, OPT_SHAPE, POSITIONS
from rlhf.data.templates import ASSISTANT, TURN_TOKENS, USER
from rlhf.sources.builtin_chats import chats


def write_model(config: dict[str, Any], path: Path) -> None:
    """Write an OPT with random weights in 32 bits, and a tokenizer that is trained on the chats."""
    shape = OPT_SHAPE.fullmatch(config["model"])
    assert shape is not None, config["model"]
    layers, hidden, vocabulary = (int(shape[k]) for k in ("layers", "hidden", "vocabulary"))
    tokenizer = _tokenizer(vocabulary)
    set_seed(config["seed"])
    model = OPTForCausalLM(_opt(layers, hidden, tokenizer))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE, trained on the chats; BOS, EOS and padding are three different tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>", USER, ASSISTANT]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator((" ".join(turns) for _, turns in chats()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TURN_TOKENS,
        model_max_length=POSITIONS,
        padding_side="left",
    )


def _opt(layers: int, hidden: int, tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        ffn_dim=4 * hidden,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
