"""Publishing what a training made: models, adapters, cards, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf import parallel
from rlhf.config.training import Lora, Run
from rlhf.entry.job import Job
from rlhf.models import card, saving
from rlhf.models.ema import Ema
from rlhf.training.metrics import Trained


@dataclass(frozen=True)
class Product:
    """A trained model of an artefact; with a `lora` that trained adapters alone, its adapter too."""

    model: Any  # bare
    name: str  # its directory in the artefact
    title: str  # of its card
    lora: Lora | None = None
    adapter: str = ""  # the adapter's directory
    base: Path | None = None  # the model that the adapter belongs to
    ema: Ema | None = None  # publish the mean of the weights, not the weights


def publish_trained(
    job: Job,
    trained: Trained,
    products: Sequence[Product],
    tokenizer: PreTrainedTokenizerFast,
    temperature: float = 1.0,
) -> None:
    """Publish a training's artefact and leave the other processes. All processes call it together.

    Args:
        temperature: at which responses were sampled, which becomes `generate`'s default.
    """
    with job.publish() as draft:
        draft.provenance["metrics"] = trained.metrics
        draft.run |= {"speed": trained.log.speed(), "decided": decided(trained.run)}
        for product in products:
            with product.ema.applied() if product.ema else nullcontext():
                saving.save(product.model, tokenizer, draft.path / product.name, temperature)
            if parallel.rank() == 0:
                auto_class = (
                    f"AutoModelFor{'CausalLM' if product.model.can_generate() else 'SequenceClassification'}"
                )
                card.write(draft.path / product.name, product.title, job.spec, trained.metrics, auto_class)
            if product.lora and product.lora.only:
                saving.save_adapter(
                    product.model, product.lora, str(product.base), draft.path / product.adapter
                )
        trained.log.finish(draft.path)
    parallel.leave()


def decided(run: Run) -> dict[str, Any]:
    """Return the fields that may be `auto`, as they were decided for this machine."""
    fields = ("micro_batch_size", "generation_batch_size", "gradient_checkpointing")
    return {name: getattr(run, name) for name in fields if hasattr(run, name)}
