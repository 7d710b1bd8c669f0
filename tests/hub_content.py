"""Small models and datasets in the exact layouts of DeepSpeed-Chat's repositories on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import datasets
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import OPTConfig, OPTForCausalLM, set_seed

from rlhf.sources.builtin_chats import chats, pairs

VOCABULARY = 600
PROMPT = "\n\nHuman: {}\n\nAssistant:"

# As `facebook/opt-*` publish it: BOS and EOS are one token, and the tokenizer itself adds the BOS.
OPT_TOKENIZER = {
    "errors": "replace",
    "add_prefix_space": False,
    "add_bos_token": True,
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}


def opt(
    path: Path, *, shards: int = 1, like_350m: bool = False, prefix: str = "model.", seed: int = 1
) -> OPTForCausalLM:
    """Write an OPT with random weights as `facebook/opt-*` are published: pickles, slow tokenizer.

    Args:
        like_350m: embeddings narrower than the layers, norms after them.
        prefix: of the names in the checkpoint, which differ between the sizes.
    """
    path.mkdir(parents=True)
    set_seed(seed)
    quirks = {"word_embed_proj_dim": 16, "do_layer_norm_before": False} if like_350m else {}
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        **{"word_embed_proj_dim": 32, **quirks},
    )
    model = OPTForCausalLM(config).half()
    model.config.save_pretrained(path)
    tensors = {k.replace("model.", prefix, 1): v.clone() for k, v in model.state_dict().items()}
    _save_pickles(tensors, path, shards)
    _tokenizer(path)
    for copy in ("flax_model.msgpack", "tf_model.h5"):
        (path / copy).write_bytes(b"nobody needs this")
    (path / "README.md").write_text("---\nlicense: other\n---\n# OPT\n")
    return model


def _save_pickles(tensors: dict, path: Path, shards: int) -> None:
    names = list(tensors)
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        torch.save({n: tensors[n] for n in names[i::shards]}, path / name)
    if shards > 1:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))


def _tokenizer(path: Path) -> None:
    for name, content in _trained_bpe().items():
        (path / name).write_text(content)
    (path / "tokenizer_config.json").write_text(json.dumps(OPT_TOKENIZER))
    tokens = {k: v for k, v in OPT_TOKENIZER.items() if k.endswith("_token") and isinstance(v, str)}
    (path / "special_tokens_map.json").write_text(json.dumps(tokens))


@cache
def _trained_bpe() -> dict[str, str]:
    """Return the files of a byte-level BPE, with OPT's special tokens in their places."""
    bpe = ByteLevelBPETokenizer()
    text = (" ".join(turns) for _, turns in islice(chats(), 200))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(text, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        return {Path(p).name: Path(p).read_text() for p in bpe.save_model(folder)}


def _conversations(start: int, count: int) -> list[dict]:
    return list(islice(pairs(Counter()), start, start + count))


def rm_static(path: Path, rows: int = 600) -> None:
    """Write pairs as `Dahoas/rm-static` holds them: prompts with turns, responses with a leading space."""
    found = [
        {
            "prompt": PROMPT.format(r["prompt"]),
            "response": " " + r["chosen"],
            "chosen": " " + r["chosen"],
            "rejected": " " + r["rejected"],
        }
        for r in _conversations(0, rows)
    ]
    found[1]["prompt"] = "\n\nHuman: hi\n\nAssistant: hello, how are you?" + found[1]["prompt"]
    _parquet(path, "train", found)
    _parquet(path, "test", found[:10])


def full_hh_rlhf(path: Path, rows: int = 600) -> None:
    """Write pairs as `Dahoas/full-hh-rlhf` holds them; some prompts are rm-static's too."""
    found = [
        {
            "prompt": PROMPT.format(r["prompt"]),
            "response": " " + r["chosen"],
            "chosen": " " + r["chosen"],
            "rejected": " " + r["rejected"],
        }
        for r in _conversations(300, rows)
    ]
    _parquet(path, "train", found)
    _parquet(path, "test", found[:10])


def synthetic_instruct(path: Path, rows: int = 600) -> None:
    """Write pairs as `Dahoas/synthetic-instruct-gptj-pairwise` holds them: no turns, no space before."""
    found = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in _conversations(900, rows)]
    found[0]["chosen"] = ""
    _parquet(path, "train", found)


def _parquet(path: Path, split: str, rows: list[dict]) -> None:
    (path / "data").mkdir(parents=True, exist_ok=True)
    file = path / f"data/{split}-00000-of-00001-2a1df75c6bce91ab.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)


def deepspeed_chats_repositories(root: Path) -> None:
    """Write two OPTs and DeepSpeed-Chat's three datasets, small, in a server's directory."""
    opt(root / "models/facebook/opt-1.3b", shards=2, prefix="")
    opt(root / "models/facebook/opt-350m", like_350m=True, seed=2)
    rm_static(root / "datasets/Dahoas/rm-static")
    full_hh_rlhf(root / "datasets/Dahoas/full-hh-rlhf")
    synthetic_instruct(root / "datasets/Dahoas/synthetic-instruct-gptj-pairwise")
