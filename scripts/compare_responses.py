"""Compare responses before and after RLHF on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf import jsonl, parallel
from rlhf.config.stages import Eval
from rlhf.config.training import RlhfRun
from rlhf.data.templates import load_tokenizer
from rlhf.entry.job import read_job
from rlhf.errors import run_main
from rlhf.evaluation import comparison
from rlhf.files import write_json
from rlhf.models import loading
from rlhf.store.layout import ACTOR, MODEL, RESPONSES, SUMMARY, TABLE
from rlhf.training import engine


def main() -> None:
    job = read_job(__doc__)
    config, run = Eval.model_validate(job.spec["config"]), job.run
    after, before = job.parents["rlhf"] / ACTOR, job.parents["sft"] / MODEL
    dtype = engine.stored_dtype(after)
    engine.start(run, dtype)
    models = comparison.Models(
        actor=_load(loading.load_actor, after, dtype, run),
        reference=_load(loading.load_actor, before, dtype, run, offloads="reference" in run.offload),
        reward=_load(loading.load_scorer, job.parents["reward"] / MODEL, dtype, run),
        tokenizer=load_tokenizer(after),
    )
    rows, figures = comparison.compare(models, job.parents["data"], config, run)
    with job.publish() as draft:
        draft.provenance["metrics"] = figures
        if parallel.rank() == 0:
            jsonl.write(draft.path / RESPONSES, rows)
            write_json(draft.path / SUMMARY, figures)
            (draft.path / TABLE).write_text(comparison.table(rows, figures), encoding="utf-8")
    parallel.leave()


def _load(load: Any, path: Path, dtype: str, run: RlhfRun, *, offloads: bool = False) -> Any:
    """Return a model that only computes, sharded as in the PPO stage."""
    with engine.loading(path, dtype, sharded=run.zero_stage == 3 or offloads, offloads=offloads):
        model = load(path, engine.DTYPES[dtype])
    return engine.frozen(model, dtype, offloads=offloads)


if __name__ == "__main__":
    run_main(main)
