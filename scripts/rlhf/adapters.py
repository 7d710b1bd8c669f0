"""Adapters: a dataset's own rows become one of three row types.

A row's `group` decides which phase it belongs to: rows of one group never meet in two phases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Turns = tuple[str, ...]  # the user's first, speakers in turn, the user's last


@dataclass(frozen=True)
class Prompt:
    """Something to reply to."""

    turns: Turns
    group: str


@dataclass(frozen=True)
class Response(Prompt):
    """A prompt and a reply worth imitating."""

    response: str

    def texts(self) -> tuple[str, ...]:
        """Return what follows the prompt, part by part."""
        return (self.response,)


@dataclass(frozen=True)
class Preference(Prompt):
    """A prompt and two replies, the better one first."""

    chosen: str
    rejected: str

    def texts(self) -> tuple[str, ...]:
        """Return what follows the prompt, part by part."""
        return (self.chosen, self.rejected)


Row = Response | Preference


def chitchat(row: dict[str, Any]) -> Response:
    """Adapt a turn and the reply to it; whole blocks of conversations stay together."""
    return Response((row["prompt"],), row["group"], row["response"])


def chitchat_pairs(row: dict[str, Any]) -> Preference:
    """Adapt a turn and two replies; both replies are of one block of conversations."""
    return Preference((row["prompt"],), row["group"], row["chosen"], row["rejected"])


ADAPTERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "builtin/chitchat": chitchat,
    "builtin/chitchat-pairs": chitchat_pairs,
}


def for_phase(row: Row, phase: str) -> tuple[str, ...]:
    """Return what a phase learns from a row: nothing (rlhf), one reply (sft), two (reward)."""
    if phase == "rlhf":
        return ()
    return row.texts() if phase == "reward" else row.texts()[:1]
