"""Whether a PPO training looks well, in words. It warns; it changes nothing.

Bounds are wide: a training within them may still be poor, one outside them is worth a look.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """What a metric should be, and what it means when it is not."""

    metric: str
    least: float
    most: float
    meaning: str
    since: int = 1  # the first iteration that is checked


BOUNDS = (
    # Both sides come from the training forward: it shows whether that repeats, nothing about generation.
    Bound("first_approx_kl", -1e-3, 0.01,
          "with the same weights the training forward gives other log-probs than at the rollout: dropout is on,"
          " or weights changed in between"),
    Bound("sampler_kl", -1e-4, 1e-3,
          "sampler and trainer are two policies: a mask, a position or weights differ between them"),
    Bound("sampler_outside", 0, 0.01, "the trainer gives some sampled tokens another probability than the sampler"),
    Bound("sampler_ess", 0.9, 1.001, "sampler and trainer disagree on many tokens"),
    Bound("ratio_mean", 0.9, 1.1, "updates move the policy far: lower the learning rate or ppo_epochs"),
    Bound("clip_fraction", 0, 0.4, "most of a mini-batch is clipped: lower the learning rate or ppo_epochs"),
    Bound("approx_kl", -1e-3, 0.1, "an iteration moves the policy far: lower the learning rate or ppo_epochs"),
    Bound("kl_ref", -1, 10, "responses are far from the SFT model's: raise kl_coef, or set kl_target"),
    Bound("entropy", 0.1, float("inf"), "the policy is nearly deterministic: raise kl_coef or the temperature"),
    Bound("explained_variance", -1, 1, "the critic is worse than a constant: lower its learning rate",
          since=10),  # it has to learn first
    Bound("ended", 0.2, 1, "most responses do not end: raise max_new_tokens or missing_eos_penalty"),
    Bound("score_length_correlation", -0.9, 0.9, "the score says little more than the length of a response"),
    Bound("length", 2, float("inf"), "responses shrink to nothing: look at what the reward model prefers"),
)  # fmt: skip


@dataclass
class Health:
    """Says once when a metric leaves its bounds, and once when it is back."""

    outside: set[str] = field(default_factory=set)

    def look(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Compare an iteration's metrics with their bounds; log those that leave them or are back."""
        for bound in BOUNDS:
            value, name = metrics[bound.metric], bound.metric
            well = bound.least <= value <= bound.most or iteration < bound.since
            if not well and name not in self.outside:
                logger.warning("iteration %d: %s", iteration, in_words(bound, value))
            elif well and name in self.outside:
                logger.info("iteration %d: %s = %.3g is back within its bounds", iteration, name, value)
            self.outside = self.outside - {name} if well else self.outside | {name}


def in_words(bound: Bound, value: float) -> str:
    """Return what is wrong with a value outside its bounds."""
    side, limit = ("below", bound.least) if value < bound.least else ("above", bound.most)
    return f"{bound.metric} = {value:.3g} is {side} {limit:g}: {bound.meaning}"
