"""The SFT stage: fine-tune the actor on responses."""

from __future__ import annotations

from rlhf.config.stages import Sft
from rlhf.data.templates import load_tokenizer
from rlhf.entry.job import read_job
from rlhf.entry.trained import Product, publish_trained
from rlhf.errors import run_main
from rlhf.models import loading
from rlhf.store.layout import ADAPTER, MODEL
from rlhf.training import engine, sft, supervised
from rlhf.training.paths import Paths


def main() -> None:
    job = read_job(__doc__)
    config, pretrained = job.settings(Sft), job.parents["model"]
    loading.refuse_too_long(pretrained, config.max_tokens, "sft.max_tokens")
    engine.start(config.run, config.dtype)
    tokenizer = load_tokenizer(pretrained)
    with engine.loading(pretrained, config.dtype, sharded=config.run.zero_stage == 3):
        model = loading.load_actor(pretrained, engine.DTYPES[config.dtype])
    task = sft.task(tokenizer.pad_token_id, config.max_tokens if config.run.packing else None)
    paths = Paths(job.parents["data"], job.work, job.board)
    trained = supervised.train(task, model, config, job.seed, paths)
    product = Product(model, MODEL, "SFT actor", config.lora, ADAPTER, pretrained)
    publish_trained(job, trained, [product], tokenizer)


if __name__ == "__main__":
    run_main(main)
