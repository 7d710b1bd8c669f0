"""Judges: a measure of a response that does not depend on the reward model."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.data.sentiment import vader

JUDGES: dict[str, Callable[[str], float]] = {"vader": vader}
