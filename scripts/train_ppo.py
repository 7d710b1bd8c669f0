"""Step 3: PPO of the SFT actor against the reward model."""

from __future__ import annotations

from pathlib import Path

from rlhf import card, engine, models, parallel, ppo, stage
from rlhf.config import Rlhf
from rlhf.errors import DataError, run_main
from rlhf.generation import Sampling
from rlhf.templates import load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    engine.start(args.run)
    config, seed = stage.settings(Rlhf, args), args.spec["config"]["seed"]
    actor, scorer = args.parents["sft"] / "model", args.parents["reward"] / "model"
    tokenizer, other = load_tokenizer(actor), load_tokenizer(scorer)
    if tokenizer.get_vocab() != other.get_vocab():
        raise DataError(
            f"actor and reward model have different tokenizers ({actor}: {len(tokenizer)} tokens,"
            f" {scorer}: {len(other)}): the reward model would read other words than were written"
        )
    four = _load(actor, scorer, config)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    measured, metrics = ppo.train(four, config, sampling, seed, args.parents["data"], args.work, args.board)
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = measured
        made = {
            "actor": (four.actor, "RLHF actor", "AutoModelForCausalLM"),
            "critic": (four.critic, "RLHF critic", "AutoModelForSequenceClassification"),
        }
        for name, (model, title, kind) in made.items():
            models.save(model, tokenizer, draft.path / name)
            if parallel.rank() == 0:
                card.write(draft.path / name, title, args.spec, measured, kind)
        metrics.finish(draft.path)


def _load(actor: Path, scorer: Path, config: Rlhf) -> ppo.Models:
    dtype, stage_ = engine.DTYPES[config.dtype], config.run.zero_stage
    with engine.loading(actor, config.dtype, stage_):
        policies = [models.load_actor(actor, dtype) for _ in range(2)]
    with engine.loading(scorer, config.dtype, stage_):
        scorers = [models.load_scorer(scorer, dtype) for _ in range(2)]
    return ppo.Models(policies[0], scorers[0], policies[1], scorers[1])


if __name__ == "__main__":
    run_main(main)
