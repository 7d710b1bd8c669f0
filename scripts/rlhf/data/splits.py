"""The stage that a row belongs to: a function of a hash of its group, and of nothing else.

DeepSpeed-Chat splits each dataset by row, so the same prompt can train one stage and test another.
Here a group is in one stage, for all datasets together and in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rlhf.store.layout import EVAL


def position(group: str) -> float:
    """Return a number in [0, 1) for a group; uniform over groups."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def stage_of(group: str, shares: Mapping[str, float], eval_share: float) -> str:
    """Return the stage of a group, or `EVAL` if the group is held out from every stage.

    Args:
        shares: stage -> its share of the groups that are not held out; the sum need not be 1.
        eval_share: share of all groups that are held out.
    """
    number = position(group)
    if number < eval_share:
        return EVAL
    remainder = (number - eval_share) / (1 - eval_share) * sum(shares.values())
    for stage in sorted(shares):
        remainder -= shares[stage]
        if remainder < 0:
            return stage
    return sorted(shares)[-1]  # rounding can leave a remainder of 0 at the upper end
