"""Random streams: every purpose has its own stream, derived from the one seed of a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What random numbers are for. A value never changes its meaning, because artefacts depend on it."""

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
    """Return the generator of a purpose.

    Args:
        numbers: select one of the purpose's streams; equally many in all calls for a purpose.
    """
    return np.random.default_rng([seed, purpose, *numbers])


def seed_of(seed: int, purpose: Purpose) -> int:
    """Return the seed of a purpose, for generators of other libraries."""
    return int(rng(seed, purpose).integers(2**63))


@dataclass(frozen=True)
class Stream:
    """Random numbers for numbered samples: a sample has the same numbers in every process and batch."""

    seed: int
    purpose: Purpose
    first: int = 0  # number of the first sample

    def row(self, sample: int, length: int) -> NDArray[np.float64]:
        """Return (length,) float64: random numbers in [0, 1) for a sample, counted from the first one."""
        return rng(self.seed, self.purpose, self.first + sample).random(length)
