"""Which phase a row belongs to, from a hash of its group alone.

DeepSpeed-Chat splits by row and set, so the same prompt can train one phase and test another. Here
the group decides, over all datasets together, on any number of workers, in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

EVAL = "eval"


def place(group: str) -> float:
    """Return where in [0, 1) a group falls; uniform over groups."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def phase_of(group: str, shares: Mapping[str, float], eval_share: float) -> str:
    """Return the phase that a group belongs to, or `EVAL`: held out from every phase."""
    where = place(group)
    if where < eval_share:
        return EVAL
    where = (where - eval_share) / (1 - eval_share) * sum(shares.values())
    for phase in sorted(shares):
        where -= shares[phase]
        if where < 0:
            return phase
    return sorted(shares)[-1]  # rounding at the upper end
