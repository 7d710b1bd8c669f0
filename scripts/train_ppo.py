"""Step 3: PPO of the SFT actor against the reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerFast

from rlhf import card, engine, families, models, parallel, ppo, stage, store
from rlhf.config import Rlhf
from rlhf.ema import Ema
from rlhf.errors import DataError, run_main
from rlhf.generation import Sampling
from rlhf.metrics import Values
from rlhf.templates import differences, load_tokenizer


def main() -> None:
    args = stage.arguments(__doc__)
    config, seed = stage.settings(Rlhf, args), args.spec["config"]["seed"]
    actor, scorer = args.parents["sft"] / "model", args.parents["reward"] / "model"
    refuse_unfit(actor, scorer, config)
    engine.start(args.run, config.dtype)
    tokenizer = common_tokenizer(actor, scorer)
    four = ppo.load(actor, scorer, config)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    measured, metrics, ema = ppo.train(four, config, sampling, seed, args.parents, args.work, args.board)
    with stage.publish(args) as draft:
        draft.provenance["metrics"] = measured
        save_models(draft, args, config, tokenizer, four, measured, ema)
        metrics.finish(draft.path)
    parallel.leave()


def refuse_unfit(actor: Path, scorer: Path, config: Rlhf) -> None:
    """Raise UserError if one of the models cannot do what the configuration asks of it."""
    longest, fields = (
        config.max_prompt_tokens + config.max_new_tokens,
        "rlhf.max_prompt_tokens + max_new_tokens",
    )
    for model in (actor, scorer):
        models.refuse_too_long(model, longest, fields)
    if config.run.inference_tp_size > 1:
        families.refuse_uneven(AutoConfig.from_pretrained(actor), config.run.inference_tp_size)


def common_tokenizer(actor: Path, scorer: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of both models.

    Raises:
        DataError: they have two that differ.
    """
    tokenizer, other = load_tokenizer(actor), load_tokenizer(scorer)
    if differ := differences(tokenizer, other):
        raise DataError(
            f"the tokenizers of {actor} ({len(tokenizer)} tokens) and {scorer} ({len(other)}) differ in"
            f" {', '.join(differ)}: the reward model would read another conversation than was held"
        )
    return tokenizer


def save_models(
    draft: store.Draft, args: stage.Arguments, config: Rlhf, tokenizer: PreTrainedTokenizerFast,
    four: ppo.Models, measured: Values, ema: Ema | None,
) -> None:  # fmt: skip
    """Write actor and critic, their adapters, and the mean of the actor's weights."""

    def save(model: Any, name: str, title: str, kind: str) -> None:
        models.save(model, tokenizer, draft.path / name, config.temperature)
        if parallel.rank() == 0:
            card.write(draft.path / name, title, args.spec, measured, kind)

    save(four.actor, "actor", "RLHF actor", "AutoModelForCausalLM")
    save(four.critic, "critic", "RLHF critic", "AutoModelForSequenceClassification")
    for name, model, adapters, base in (
        ("actor_adapter", four.actor, config.actor_lora, args.parents["sft"]),
        ("critic_adapter", four.critic, config.critic_lora, args.parents["reward"]),
    ):
        if adapters and adapters.only:
            models.save_adapter(model, adapters, str(base / "model"), draft.path / name)
    if ema:
        with ema.in_place():
            title = f"RLHF actor, mean of its weights (decay {ema.decay})"
            save(four.actor, "actor_ema", title, "AutoModelForCausalLM")


if __name__ == "__main__":
    run_main(main)
