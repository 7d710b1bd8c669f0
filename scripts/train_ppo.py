"""The PPO stage: train the SFT actor against the reward model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerFast

from rlhf.config.stages import Rlhf
from rlhf.data.templates import differences, load_tokenizer
from rlhf.entry.job import Job, read_job
from rlhf.entry.trained import Product, publish_trained
from rlhf.errors import DataError, run_main
from rlhf.generation.sampling import Sampling
from rlhf.models import families, loading
from rlhf.store.layout import ACTOR, ACTOR_ADAPTER, ACTOR_EMA, CRITIC, CRITIC_ADAPTER, MODEL
from rlhf.training import engine, ppo
from rlhf.training.metrics import Trained
from rlhf.training.paths import Paths
from rlhf.training.rollout import Models


def main() -> None:
    job = read_job(__doc__)
    config = job.settings(Rlhf)
    actor, scorer = job.parents["sft"] / MODEL, job.parents["reward"] / MODEL
    refuse_unfit(actor, scorer, config)
    engine.start(config.run, config.dtype)
    tokenizer = common_tokenizer(actor, scorer)
    models = ppo.load(actor, scorer, config)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    paths = Paths(job.parents["data"], job.work, job.board, job.parents.get("ptx"))
    trained = ppo.train(models, config, sampling, job.seed, paths)
    publish_trained(job, trained, list(products(job, config, models, trained)), tokenizer, config.temperature)


def refuse_unfit(actor: Path, scorer: Path, config: Rlhf) -> None:
    """Raise UserError if one of the models cannot do what the configuration requires of it."""
    fields = "rlhf.max_prompt_tokens + max_new_tokens"
    for model in (actor, scorer):
        loading.refuse_too_long(model, config.max_prompt_tokens + config.max_new_tokens, fields)
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
            f" {', '.join(differ)}: the reward model would read another conversation than the actor wrote."
            " Start both stages from models with one tokenizer"
        )
    return tokenizer


def products(job: Job, config: Rlhf, models: Models, trained: Trained) -> Iterator[Product]:
    """Yield the models to publish: actor, critic and, with `ema_decay`, the mean of the actor's weights."""
    sft, reward = job.parents["sft"] / MODEL, job.parents["reward"] / MODEL
    yield Product(models.actor, ACTOR, "RLHF actor", config.actor_lora, ACTOR_ADAPTER, sft)
    yield Product(models.critic, CRITIC, "RLHF critic", config.critic_lora, CRITIC_ADAPTER, reward)
    if trained.ema:
        title = f"RLHF actor, mean of its weights (decay {trained.ema.decay})"
        yield Product(models.actor, ACTOR_EMA, title, ema=trained.ema)


if __name__ == "__main__":
    run_main(main)
