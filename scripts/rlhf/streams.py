"""Random streams: a scenario's one seed gives every purpose a stream of its own."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What randomness is for. A number, once given, keeps its meaning: artefacts depend on it."""

    PASS = 1
    WINDOW = 2
    ROLLOUT = 3
    CALIBRATION = 4
    EVALUATION = 5
    CHAT = 6
    SHUFFLED_SCORES = 7
    MINI_BATCHES = 8
    HEAD = 9
    LORA = 10
    CRITIC_LORA = 11


def rng(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return the generator of a purpose; `numbers` say which of its streams, as many at every call."""
    return np.random.default_rng([seed, purpose, *numbers])


def seed_of(seed: int, purpose: Purpose) -> int:
    """Return the seed of a purpose, for generators of another library."""
    return int(rng(seed, purpose).integers(2**63))
