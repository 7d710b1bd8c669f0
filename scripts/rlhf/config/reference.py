"""Which model is the reference of the PPO stage.

The configuration's checks use this rule too, but edits of those rename no artefact. An edit of this
rule must, so it has a module of its own.
"""

from __future__ import annotations

from rlhf.config.training import Lora


def is_actor_without_adapters(actor_lora: Lora | None) -> bool:
    """Return whether the actor without its adapters is the reference, so that no second copy is needed."""
    return actor_lora is not None and actor_lora.only
