"""Names of the files inside an artefact, names under `results/` that link to them, and roles of parents."""

from __future__ import annotations

from pathlib import Path

# Models, and their adapters in PEFT's format.
MODEL, ADAPTER = "model", "adapter"  # of the SFT and reward stages
ACTOR, ACTOR_ADAPTER, ACTOR_EMA = "actor", "actor_adapter", "actor_ema"
CRITIC, CRITIC_ADAPTER = "critic", "critic_adapter"
METRICS, CURVES = "metrics.jsonl", "curves.png"
CARD = "card.json"  # counts of a dataset or of tokenised rows
FILES = "files"  # a dataset's files, unchanged
TRAIN, EVAL = "train", "eval"  # splits of tokenised rows
RESPONSES, SUMMARY, TABLE = "responses.jsonl", "summary.json", "table.txt"  # of a comparison

# Roles of the parents of tokenised rows; a dataset's name follows `DATASET`.
TOKENIZER, DATASET = "tokenizer", "dataset:"

# Name below `results/{scenario}/` -> path inside its stage's artefact; `rlhf/eval` is an artefact itself.
RESULTS = {
    "sft/actor": MODEL,
    "sft/adapter": ADAPTER,
    "sft/curves.png": CURVES,
    "reward/model": MODEL,
    "reward/adapter": ADAPTER,
    "reward/curves.png": CURVES,
    "rlhf/actor": ACTOR,
    "rlhf/actor_adapter": ACTOR_ADAPTER,
    "rlhf/actor_ema": ACTOR_EMA,
    "rlhf/critic": CRITIC,
    "rlhf/critic_adapter": CRITIC_ADAPTER,
    "rlhf/curves.png": CURVES,
}
# Result -> names that are made with it: what it was built from, and curves.
COMPANIONS = {
    "sft/actor": ("sft/curves.png",),
    "reward/model": ("reward/curves.png",),
    "rlhf/actor": (
        "sft/actor",
        "sft/curves.png",
        "reward/model",
        "reward/curves.png",
        "rlhf/critic",
        "rlhf/curves.png",
    ),
}


def work_of(artefact: Path) -> Path:
    """Return the directory of unfinished work on an artefact; both paths are relative to the volume."""
    return Path("work", artefact.as_posix().removeprefix("store/"))
