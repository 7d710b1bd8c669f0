"""Adapters: from a dataset's own rows to prompts, responses and preferences.

A row's `group` decides its stage, so the rows of a group are never in two stages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config.sources import Columns
from rlhf.config.stages import Stage

Turns = tuple[str, ...]  # user and assistant alternate; the first and the last turn are the user's

_TURN = re.compile(r"(?:^|\n\n)[ ]*(Human|Assistant):")


class Unusable(Exception):
    """A row that cannot be trained on; `card.json` counts such rows by this text."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to respond to."""

    turns: Turns
    group: str

    def texts(self) -> tuple[str, ...]:
        """Return the responses that follow the prompt: none, one or two."""
        return ()


@dataclass(frozen=True)
class Response(Prompt):
    """A prompt and a response worth imitating."""

    response: str

    def texts(self) -> tuple[str, ...]:
        """Return the response."""
        return (self.response,)


@dataclass(frozen=True)
class Preference(Prompt):
    """A prompt, and a better and a worse response to it."""

    chosen: str
    rejected: str

    def texts(self) -> tuple[str, ...]:
        """Return the chosen response, then the rejected one."""
        return (self.chosen, self.rejected)


def adapt(row: Mapping[str, Any], columns: Columns, stage: Stage) -> Prompt:
    """Return a stage's form of a row: a `Prompt` (rlhf), `Response` (sft) or `Preference` (reward).

    Raises:
        Unusable: a text is empty, turns do not alternate, a response does not follow the prompt, or the two
            responses are the same.
    """
    turns = _turns(row[columns.prompt], columns.dialogue)
    group = _group(row[columns.group], columns.group) if columns.group else normalised(turns[0])
    if stage == "rlhf":
        return Prompt(turns, group)
    if stage == "sft":
        turns, response = _completed(turns, row[str(columns.response or columns.chosen)])
        return Response(turns, group, response)
    turns, chosen = _completed(turns, row[str(columns.chosen)])
    others, rejected = _completed(turns, row[str(columns.rejected)])
    if others != turns:
        raise Unusable("chosen and rejected do not answer the same conversation")
    if chosen == rejected:
        raise Unusable("both responses are the same")
    return Preference(turns, group, chosen, rejected)


def _group(value: Any, column: str) -> str:
    """Return the group of a row; rows without one are no group together."""
    if value is None or value == "":
        raise Unusable(f"no group in column {column!r}")
    return str(value)


def normalised(text: str) -> str:
    """Return a text without differences of case, spacing and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _turns(value: Any, dialogue: bool) -> Turns:
    """Return the turns of a prompt: a list of messages, text with Human: and Assistant:, or plain text."""
    if isinstance(value, list):
        speakers = [_message(message) for message in value]
        if speakers and speakers[0][0] == "system":
            raise Unusable("a system message, which is not supported")
        turns = _alternating(speakers, "user", "assistant")
    elif not isinstance(value, str):
        raise Unusable("no prompt" if value is None else "a prompt that is not text")
    else:
        turns = _dialogue(value) if dialogue else (value.strip(),)
    if not all(turns):
        raise Unusable("an empty turn")
    return turns


def has_turns(text: str) -> bool:
    """Return whether a text begins with a Human: turn and has an Assistant: turn after it."""
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
    """Split a dialogue in the format of Anthropic and Dahoas, which ends with an empty Assistant: turn."""
    before, *pieces = _TURN.split(text.rstrip())  # speaker, text, speaker, text, ...
    if before.strip() or not pieces:
        raise Unusable("the prompt does not begin with a Human: turn")
    speakers = list(zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True))
    if speakers[-1] != ("Assistant", ""):
        raise Unusable("the prompt does not end where the Assistant: begins")
    return _alternating(speakers[:-1], "Human", "Assistant")


def _alternating(speakers: list[tuple[str, str]], first: str, second: str) -> Turns:
    """Return the texts of (speaker, text) turns, if the first speaker begins and ends them."""
    expected = [first, second] * len(speakers)
    if len(speakers) % 2 == 0 or any(name != e for (name, _), e in zip(speakers, expected, strict=False)):
        raise Unusable("the speakers do not take turns")
    return tuple(text for _, text in speakers)


def _completed(turns: Turns, value: Any) -> tuple[Turns, str]:
    """Return the turns before a response, and the response: text, or the last of a list of messages.

    Messages before the last one repeat the prompt or go on after it, and become part of it. Nothing of them
    is left out in silence.
    """
    if not isinstance(value, list):
        return turns, _response(value)
    *before, (role, text) = [_message(message) for message in value] or [("assistant", "")]
    if role != "assistant":
        raise Unusable("a response whose last message is not the assistant's")
    if before and before[0][0] == "system":
        raise Unusable("a system message, which is not supported")
    if before and before[0][0] == "assistant":
        before = [*zip(("user", "assistant") * len(turns), turns, strict=False), *before]
    spoken = _alternating(before, "user", "assistant") if before else turns
    if spoken[: len(turns)] != turns:
        raise Unusable("messages of a response that do not begin with the prompt")
    if not all(spoken):
        raise Unusable("an empty turn")
    return spoken, _response(text)


def _response(value: Any) -> str:
    """Return the text of a response."""
    value = "" if value is None else value
    if not isinstance(value, str):
        raise Unusable("a response that is not text")
    if not value.strip():
        raise Unusable("an empty response")
    return value.strip()
