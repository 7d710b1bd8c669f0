"""Compare replies before and after RLHF on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf import comparison, engine, jsonl, models, parallel, stage, store
from rlhf.config import Eval, RlhfRun
from rlhf.errors import run_main
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    config, run = Eval.model_validate(args.spec["config"]), args.run
    after, before = args.parents["rlhf"] / "actor", args.parents["sft"] / "model"
    dtype = engine.stored_dtype(after)
    engine.start(run, dtype)
    actor = _load(models.load_actor, after, dtype, run)
    reference = _load(models.load_actor, before, dtype, run, offloads="reference" in run.offload)
    reward = _load(models.load_scorer, args.parents["reward"] / "model", dtype, run)
    tokenizer = load_tokenizer(after)
    data = args.parents["data"]
    rows, figures = comparison.compare(actor, reference, reward, tokenizer, data, config, run)
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = figures
        if parallel.rank() == 0:
            jsonl.write(draft.path / "replies.jsonl", rows)
            store.write_json(draft.path / "summary.json", figures)
            (draft.path / "table.txt").write_text(comparison.table(rows, figures), encoding="utf-8")
    parallel.leave()


def _load(load: Any, path: Path, dtype: str, run: RlhfRun, *, offloads: bool = False) -> Any:
    """Return a model that only computes, spread out as in step 3."""
    with engine.loading(path, dtype, sharded=run.zero_stage == 3 or offloads, offloads=offloads):
        model = load(path, engine.DTYPES[dtype])
    return engine.frozen(model, dtype, offloads=offloads)


if __name__ == "__main__":
    run_main(main)
