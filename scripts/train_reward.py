"""Step 2: train a reward model on preference pairs."""

from __future__ import annotations

from rlhf import card, engine, models, parallel, reward, stage, supervised
from rlhf.config import Reward
from rlhf.errors import run_main
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    config, seed = stage.settings(Reward, args), args.spec["config"]["seed"]
    models.refuse_too_long(args.parents["model"], config.max_tokens, "reward.max_tokens")
    engine.start(args.run, config.dtype)
    tokenizer = load_tokenizer(args.parents["model"])
    dtype = engine.DTYPES[config.dtype]
    with engine.loading(args.parents["model"], config.dtype, sharded=config.run.zero_stage == 3):
        model = models.new_scorer(args.parents["model"], dtype, tokenizer.pad_token_id, seed)
    width = 2 * config.max_tokens if config.run.packing else None
    measured, metrics = supervised.train(
        reward.task(tokenizer.pad_token_id, width), model, config, seed,
        args.parents["data"], args.work, args.board,
    )  # fmt: skip
    with stage.publish(args) as draft:
        kind = "AutoModelForSequenceClassification"
        draft.provenance["metrics"] = measured
        models.save(model, tokenizer, draft.path / "model")
        if parallel.rank() == 0:
            card.write(draft.path / "model", "Reward model", args.spec, measured, kind)
        if config.lora and config.lora.only:
            models.save_adapter(model, config.lora, str(args.parents["model"]), draft.path / "adapter")
        metrics.finish(draft.path)
    parallel.leave()


if __name__ == "__main__":
    run_main(main)
