"""Bring a pretrained model to the volume, from the Hub or from a directory of the volume."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from rlhf import chat_tokenizer, fetching, stage, store, weights
from rlhf.errors import UserError, run_main

CARDS = ("README.md", "LICENSE*", "generation_config.json", "config.json")
TOKENIZER = (
    "tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.jinja",
)  # fmt: skip


def choose(names: Iterable[str]) -> list[str]:
    """Return the files that are needed; no copies for Flax or TensorFlow, no second set of weights."""
    names = list(names)
    found = weights.choose(names)
    if not found or "config.json" not in names or not chat_tokenizer.has_vocabulary(names):
        raise UserError(
            "not a usable model: it needs config.json, weights in model*.safetensors or"
            " pytorch_model*.bin, and a tokenizer in tokenizer.json, vocab.json with merges.txt, vocab.txt or"
            f" *.model; there are {', '.join(sorted(names)[:20])}"
        )
    return found + [n for n in names if any(fnmatch(n, p) for p in CARDS + TOKENIZER) and "/" not in n]


def main() -> None:
    args = stage.arguments(__doc__)
    converted = args.work / "converted"
    fetched = fetching.fetch(
        "model", args, choose, have=lambda name: (converted / weights.converted_name(name)).exists()
    )
    with stage.publish(args) as draft:
        draft.provenance["source"] = fetched.source
        weights.bring(fetched.path, draft.path, converted, fetched.ours)
        chat_tokenizer.bring(fetched.path, draft.path)
        for path in fetched.path.iterdir():
            if any(fnmatch(path.name, p) for p in CARDS):
                store.take(path, draft.path / path.name, fetched.ours)
        fetched.refuse_change()


if __name__ == "__main__":
    run_main(main)
