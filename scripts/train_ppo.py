"""Step 3: PPO of the SFT actor against the reward model."""

from __future__ import annotations

from rlhf import card, engine, models, ppo, stage
from rlhf.config import Rlhf
from rlhf.errors import DataError, run_main
from rlhf.generation import Sampling
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    engine.start(args.run.threads)
    config, seed = stage.settings(Rlhf, args), args.spec["config"]["seed"]
    actor, scorer = args.parents["sft"] / "model", args.parents["reward"] / "model"
    tokenizer, other = load_tokenizer(actor), load_tokenizer(scorer)
    if tokenizer.get_vocab() != other.get_vocab():
        raise DataError(
            f"actor and reward model have different tokenizers ({actor}: {len(tokenizer)} tokens,"
            f" {scorer}: {len(other)}): the reward model would read other words than were written"
        )
    dtype = engine.DTYPES[config.dtype]
    four = ppo.Models(
        actor=models.load_actor(actor, dtype),
        critic=models.load_scorer(scorer, dtype),
        reference=models.load_actor(actor, dtype).eval().requires_grad_(False).to(engine.device()),
        reward=models.load_scorer(scorer, dtype).eval().requires_grad_(False).to(engine.device()),
    )
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    measured, metrics = ppo.train(
        four, config, args.run, sampling, seed, args.parents["data"], args.work, args.board
    )
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = measured
        made = {
            "actor": (four.actor, "RLHF actor", "AutoModelForCausalLM"),
            "critic": (four.critic, "RLHF critic", "AutoModelForSequenceClassification"),
        }
        for name, (model, title, kind) in made.items():
            models.save(model, tokenizer, draft.path / name)
            card.write(draft.path / name, title, args.spec, measured, kind)
        metrics.finish(draft.path)


if __name__ == "__main__":
    run_main(main)
