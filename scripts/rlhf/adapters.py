"""Adapters: a dataset's own rows become one of three row types.

A row's `group` decides which phase it belongs to: rows of one group never meet in two phases.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Turns = tuple[str, ...]  # the user's first, speakers in turn, the user's last

_TURN = re.compile(r"(?:^|\n\n)[ ]*(Human|Assistant):")


class Unusable(Exception):
    """A row that cannot be learned from; the text is counted on the card."""


@dataclass(frozen=True)
class Prompt:
    """Something to reply to."""

    turns: Turns
    group: str

    def texts(self) -> tuple[str, ...]:
        """Return what follows the prompt, part by part."""
        return ()


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


def adapt(row: Mapping[str, Any], columns: Mapping[str, Any], phase: str) -> Prompt:
    """Return what a phase learns from a row: a prompt (rlhf), a reply to it (sft), or two (reward).

    Args:
        columns: as `config.Columns`.

    Raises:
        Unusable: a text is empty, the turns do not alternate, or the two replies are the same.
        KeyError: the row has no such column.
    """
    turns = _turns(row[columns["prompt"]], bool(columns.get("dialogue")))
    group = str(row[columns["group"]]) if columns.get("group") else normalised(turns[0])
    if phase == "rlhf":
        return Prompt(turns, group)
    if phase == "sft":
        return Response(turns, group, _reply(row[columns.get("response") or columns["chosen"]]))
    chosen, rejected = _reply(row[columns["chosen"]]), _reply(row[columns["rejected"]])
    if chosen == rejected:
        raise Unusable("both replies are the same")
    return Preference(turns, group, chosen, rejected)


def normalised(text: str) -> str:
    """Return a text without what does not make it another one: case, spacing, Unicode's variants."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _turns(value: Any, dialogue: bool) -> Turns:
    """Return a prompt's turns: of messages, of text with Human: and Assistant:, or of plain text."""
    if isinstance(value, list):
        speakers = [_message(message) for message in value]
        if speakers and speakers[0][0] == "system":
            raise Unusable("a system message, which is not supported")
        turns = _alternating(speakers, "user", "assistant")
    elif not isinstance(value, str):
        raise Unusable("no prompt" if value is None else "a prompt that is no text")
    else:
        turns = _dialogue(value) if dialogue else (value.strip(),)
    if not all(turns):
        raise Unusable("an empty turn")
    return turns


def has_turns(text: str) -> bool:
    """Return whether a text begins with a Human: turn and goes on with one of the Assistant:."""
    first = _TURN.match(text)
    return first is not None and first[1] == "Human" and "Assistant" in _TURN.findall(text)


def _message(value: Any) -> tuple[str, str]:
    """Return a message's role and text."""
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise Unusable("a message without role and content")
    if not isinstance(value["content"], str):
        raise Unusable("a message without text")
    return str(value["role"]), value["content"].strip()


def _dialogue(text: str) -> Turns:
    """Split the text of Anthropic's and Dahoas' dialogues, which ends with an open reply."""
    before, *parts = _TURN.split(text.rstrip())
    if before.strip() or not parts:
        raise Unusable("the prompt does not begin with a Human: turn")
    speakers = list(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
    if speakers[-1] != ("Assistant", ""):
        raise Unusable("the prompt does not end where the Assistant: begins")
    return _alternating(speakers[:-1], "Human", "Assistant")


def _alternating(speakers: list[tuple[str, str]], first: str, second: str) -> Turns:
    expected = [first, second] * len(speakers)
    if len(speakers) % 2 == 0 or any(name != e for (name, _), e in zip(speakers, expected, strict=False)):
        raise Unusable("the speakers do not take turns")
    return tuple(text for _, text in speakers)


def _reply(value: Any) -> str:
    """Return a reply's text; of messages, the last one's."""
    if isinstance(value, list) and value:
        _, value = _message(value[-1])
    value = "" if value in (None, []) else value
    if not isinstance(value, str):
        raise Unusable("a reply that is no text")
    if not value.strip():
        raise Unusable("an empty reply")
    return value.strip()
