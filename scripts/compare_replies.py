"""Compare replies before and after RLHF on held-out prompts."""

from __future__ import annotations

import torch

from rlhf import comparison, engine, jsonl, models, parallel, stage, store
from rlhf.config import Eval
from rlhf.errors import run_main
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    engine.start(args.run)
    config, where = Eval.model_validate(args.spec["config"]), parallel.device()
    paths = {
        "actor": args.parents["rlhf"] / "actor",
        "reference": args.parents["sft"] / "model",
    }
    actor, reference = (
        models.load_actor(paths[role], torch.float32).eval().to(where) for role in ("actor", "reference")
    )
    reward = models.load_scorer(args.parents["reward"] / "model", torch.float32).eval().to(where)
    tokenizer = load_tokenizer(paths["actor"])
    rows, figures = comparison.compare(actor, reference, reward, tokenizer, args.parents["data"], config)
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = figures
        jsonl.write(draft.path / "replies.jsonl", rows)
        store.write_json(draft.path / "summary.json", figures)
        (draft.path / "table.txt").write_text(comparison.table(rows, figures), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
