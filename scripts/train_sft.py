"""Step 1: fine-tune the actor on responses."""

from __future__ import annotations

from rlhf import card, engine, models, parallel, sft, stage, supervised
from rlhf.config import Sft
from rlhf.errors import run_main
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    config, seed = stage.settings(Sft, args), args.spec["config"]["seed"]
    models.refuse_too_long(args.parents["model"], config.max_tokens, "sft.max_tokens")
    engine.start(args.run, config.dtype)
    tokenizer = load_tokenizer(args.parents["model"])
    with engine.loading(args.parents["model"], config.dtype, sharded=config.run.zero_stage == 3):
        model = models.load_actor(args.parents["model"], engine.DTYPES[config.dtype])
    width = config.max_tokens if config.run.packing else None
    measured, metrics = supervised.train(
        sft.task(tokenizer.pad_token_id, width), model, config, seed,
        args.parents["data"], args.work, args.board,
    )  # fmt: skip
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = measured
        models.save(model, tokenizer, draft.path / "model")
        if parallel.rank() == 0:
            card.write(draft.path / "model", "SFT actor", args.spec, measured, "AutoModelForCausalLM")
        if config.lora and config.lora.only:
            models.save_adapter(model, config.lora, str(args.parents["model"]), draft.path / "adapter")
        metrics.finish(draft.path)
    parallel.leave()


if __name__ == "__main__":
    run_main(main)
