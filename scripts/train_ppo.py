"""Step 3: PPO of the SFT actor against the reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlhf import card, engine, families, models, parallel, ppo, reference, stage
from rlhf.config import Rlhf
from rlhf.errors import DataError, run_main
from rlhf.generation import Sampling
from rlhf.templates import differences, load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    config, seed = stage.settings(Rlhf, args), args.spec["config"]["seed"]
    engine.start(args.run, config.dtype)
    actor, scorer = args.parents["sft"] / "model", args.parents["reward"] / "model"
    tokenizer, other = load_tokenizer(actor), load_tokenizer(scorer)
    if differ := differences(tokenizer, other):
        raise DataError(
            f"the tokenizers of {actor} ({len(tokenizer)} tokens) and {scorer} ({len(other)}) differ in"
            f" {', '.join(differ)}: the reward model would read another conversation than was held"
        )
    if config.run.inference_tp_size > 1:
        families.refuse_uneven(AutoConfig.from_pretrained(actor), config.run.inference_tp_size)
    four = _load(actor, scorer, config)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    measured, metrics, ema = ppo.train(four, config, sampling, seed, args.parents, args.work, args.board)
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = measured

        def save(model: Any, name: str, title: str, kind: str) -> None:
            models.save(model, tokenizer, draft.path / name, config.temperature)
            if parallel.rank() == 0:
                card.write(draft.path / name, title, args.spec, measured, kind)

        save(four.actor, "actor", "RLHF actor", "AutoModelForCausalLM")
        save(four.critic, "critic", "RLHF critic", "AutoModelForSequenceClassification")
        for name, model, adapters, base in (
            ("actor_adapter", four.actor, config.actor_lora, actor),
            ("critic_adapter", four.critic, config.critic_lora, scorer),
        ):
            if adapters and adapters.only:
                models.save_adapter(model, adapters, str(base), draft.path / name)
        if ema:
            with ema.in_place():
                title = f"RLHF actor, mean of its weights (decay {ema.decay})"
                save(four.actor, "actor_ema", title, "AutoModelForCausalLM")
        metrics.finish(draft.path)
    parallel.leave()


def _load(actor: Path, scorer: Path, config: Rlhf) -> ppo.Models:
    run, dtype, name = config.run, engine.DTYPES[config.dtype], config.dtype
    sharded, offloads = run.zero_stage == 3, "reference" in run.offload
    with engine.loading(actor, name, sharded=sharded):
        policy = models.load_actor(actor, dtype)
    with engine.loading(actor, name, sharded=sharded or offloads, offloads=offloads):
        frozen = None if reference.is_bare_actor(config.actor_lora) else models.load_actor(actor, dtype)
    with engine.loading(scorer, name, sharded=sharded):
        scorers = [models.load_scorer(scorer, dtype) for _ in range(2)]
    return ppo.Models(policy, scorers[0], frozen, scorers[1])


if __name__ == "__main__":
    run_main(main)
