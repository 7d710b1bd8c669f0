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
    if columns.holds_conversations:
        turns, _ = _conversation(row[columns.prompt], columns.dialogue)
    else:
        turns = _turns(row[columns.prompt], columns.dialogue)
    if columns.input:
        turns = (_with_input(turns[0], row[columns.input]), *turns[1:])
    group = _group(row[columns.group], columns.group) if columns.group else normalised(turns[0])
    if stage == "rlhf":
        return Prompt(turns, group)
    if stage == "sft":
        turns, response = _answered(turns, row, str(columns.response or columns.chosen), columns)
        return Response(turns, group, response)
    before, chosen = _answered(turns, row, str(columns.chosen), columns)
    others, rejected = _answered(turns, row, str(columns.rejected), columns)
    if others != before:
        raise Unusable("chosen and rejected do not answer the same conversation")
    if chosen == rejected:
        raise Unusable("both responses are the same")
    return Preference(before, group, chosen, rejected)


def _answered(turns: Turns, row: Mapping[str, Any], column: str, columns: Columns) -> tuple[Turns, str]:
    """Return the turns before the response in a column, and the response."""
    if not columns.holds_conversations:
        return _completed(turns, row[column])
    before, response = _conversation(row[column], columns.dialogue)
    if response is None:
        raise Unusable("a conversation that does not end with a response")
    return before, _response(response)


def _with_input(instruction: str, value: Any) -> str:
    """Return an instruction with what it is about, after an empty line."""
    if value is not None and not isinstance(value, str):
        raise Unusable("an input that is not text")
    return f"{instruction}\n\n{value.strip()}" if value and value.strip() else instruction


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
        turns = _alternating(_messages(value), "user", "assistant")
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


def _conversation(value: Any, dialogue: bool) -> tuple[Turns, str | None]:
    """Return the turns of a whole conversation, and the response at its end, or None if it ends with the user."""
    if isinstance(value, list):
        speakers = _messages(value)
    elif isinstance(value, str) and dialogue:
        names = {"Human": "user", "Assistant": "assistant"}
        speakers = [(names[speaker], text) for speaker, text in _speakers(value)]
        if speakers[-1] == ("assistant", ""):
            speakers.pop()
    else:
        raise Unusable("a conversation that is neither messages nor, with columns.dialogue, text with turns")
    response = speakers.pop()[1] if speakers and speakers[-1][0] == "assistant" else None
    turns = _alternating(speakers, "user", "assistant")
    if not all(turns):
        raise Unusable("an empty turn")
    return turns, response


ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}


def _messages(value: list[Any]) -> list[tuple[str, str]]:
    """Return role and text of each message of a list."""
    messages = [_message(message) for message in value]
    if messages and messages[0][0] == "system":
        raise Unusable("a system message, which is not supported")
    return messages


def _message(value: Any) -> tuple[str, str]:
    """Return a message's role and text, from OpenAI's form (role, content) or ShareGPT's (from, value)."""
    value = value if isinstance(value, Mapping) else {}
    fields = ("role", "content") if "role" in value else ("from", "value")
    if not set(fields) <= value.keys():
        raise Unusable("a message without role and content")
    name, content = (value[field] for field in fields)
    role = ROLES.get(str(name).lower())
    if role is None:
        raise Unusable(f"a message of role {name!r}, which is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # parts, of which only text can be read
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Unusable("a message with a part that is not text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Unusable("a message without text")
    return role, content.strip()


def _dialogue(text: str) -> Turns:
    """Split a dialogue in the format of Anthropic and Dahoas, which ends with an empty Assistant: turn."""
    speakers = _speakers(text)
    if speakers[-1] != ("Assistant", ""):
        raise Unusable("the prompt does not end where the Assistant: begins")
    return _alternating(speakers[:-1], "Human", "Assistant")


def _speakers(text: str) -> list[tuple[str, str]]:
    """Return speaker and text of each turn of a dialogue that begins with a Human: turn."""
    before, *pieces = _TURN.split(text.rstrip())  # speaker, text, speaker, text, ...
    if before.strip() or not pieces:
        raise Unusable("the prompt does not begin with a Human: turn")
    return list(zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True))


def _alternating(speakers: list[tuple[str, str]], first: str, second: str) -> Turns:
    """Return the texts of (speaker, text) turns, if the first speaker begins and ends them."""
    expected = [first, second] * len(speakers)
    if len(speakers) % 2 == 0 or any(name != e for (name, _), e in zip(speakers, expected, strict=False)):
        raise Unusable("the speakers do not take turns")
    return tuple(text for _, text in speakers)


def _completed(turns: Turns, value: Any) -> tuple[Turns, str]:
    """Return the turns before a response, and the response: text, or the last of a list of messages.

    Messages before the last one repeat the prompt or continue it, and become part of it. Nothing of them
    is left out in silence.
    """
    if not isinstance(value, list):
        return turns, _response(value)
    *before, (role, text) = _messages(value) or [("assistant", "")]
    if role != "assistant":
        raise Unusable("a response whose last message is not the assistant's")
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
