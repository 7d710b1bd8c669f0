"""Which model is the reference of step 3.

Not part of `config`, which asks too: an edit there renames no artefact, and one of this rule must.
"""

from __future__ import annotations

from rlhf.config_training import Lora


def is_bare_actor(actor_lora: Lora | None) -> bool:
    """Return whether the actor without its adapters is the reference: there is no second copy."""
    return actor_lora is not None and actor_lora.only
