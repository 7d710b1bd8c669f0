"""Fetch a pretrained model from the Hub, or copy it from a directory of the volume."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from rlhf.entry.job import read_job
from rlhf.errors import UserError, run_main
from rlhf.sources import chat_tokenizer, fetching, weights
from rlhf.store import publishing

CARDS = ("README.md", "LICENSE*", "generation_config.json", "config.json")
TOKENIZER = (
    "tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.jinja",
)  # fmt: skip


def choose(names: Iterable[str]) -> list[str]:
    """Return the files that are needed: one set of weights for torch, configuration, tokenizer and cards.

    Raises:
        UserError: some of them are missing; the text lists the files that there are.
    """
    names = list(names)
    chosen = weights.choose(names)
    if not chosen or "config.json" not in names or not chat_tokenizer.has_vocabulary(names):
        raise UserError(
            "not a usable model: it needs config.json, weights in model*.safetensors or"
            " pytorch_model*.bin, and a tokenizer in tokenizer.json, vocab.json with merges.txt, vocab.txt or"
            f" *.model; there are {', '.join(sorted(names)[:20])}"
        )
    return chosen + [n for n in names if any(fnmatch(n, p) for p in CARDS + TOKENIZER) and "/" not in n]


def main() -> None:
    job = read_job(__doc__)
    converted = job.work / "converted"
    source = fetching.Source.of("model", job.spec["config"], job.output, job.work)

    def is_converted(name: str) -> bool:
        return (converted / weights.converted_name(name)).exists()

    fetched = fetching.fetch(source, choose, done=is_converted)
    with job.publish() as draft:
        draft.provenance["source"] = fetched.record
        weights.import_weights(fetched.path, draft.path, converted, fetched.ours)
        chat_tokenizer.import_tokenizer(fetched.path, draft.path)
        for path in fetched.path.iterdir():
            if any(fnmatch(path.name, p) for p in CARDS):
                publishing.add_file(path, draft.path / path.name, fetched.ours)
        fetched.refuse_change()


if __name__ == "__main__":
    run_main(main)
