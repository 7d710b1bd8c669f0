"""The configuration of models and datasets: where they come from, and which columns hold what."""

from __future__ import annotations

import codecs
import posixpath
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from rlhf.config import catalog
from rlhf.config.section import Conflict, Section

REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]*"  # a branch, tag or commit; part of paths


def _known_model(name: str) -> str:
    if mistake := catalog.unknown_model(name):
        raise ValueError(mistake)
    return name


def _known_dataset(name: str) -> str:
    if mistake := catalog.unknown_dataset(name):
        raise ValueError(mistake)
    return name


def _by_lines(encoding: str) -> str:
    """Accept encodings in which a line ends with the byte of a newline."""
    try:
        newline = codecs.encode("\n", encoding)
    except LookupError:
        raise ValueError(f"no encoding {encoding!r} is known to Python: examples are utf-8, cp1252") from None
    if newline != b"\n":
        raise ValueError(f"{encoding} is not supported: convert the file to utf-8")
    return encoding


Encoding = Annotated[str, AfterValidator(_by_lines)]
ModelName = Annotated[str, AfterValidator(_known_model)]
DatasetName = Annotated[str, AfterValidator(_known_dataset)]


def _foreign_revision(field: str, name: str, revision: str) -> Iterator[Conflict]:
    if revision != "main" and catalog.origin(name) != "hub":
        yield (
            (field, "revision"),
            f"{name} is not on the Hub and has no revision {revision}: leave revision out",
        )


class Model(Section):
    """A pretrained model."""

    model: ModelName = Field(description="where the pretrained model comes from")
    revision: str = Field("main", pattern=f"^{REVISION}$", description="branch, tag or commit on the Hub")

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from _foreign_revision("model", self.model, self.revision)


class Columns(Section):
    """The columns of a dataset's rows, by what they hold."""

    prompt: str = Field(
        description="text, or a list of messages; the column of `response` or `chosen` where it holds whole conversations"
    )
    input: str | None = Field(None, description="what the prompt is about, added to it after an empty line")
    response: str | None = Field(None, description="a response worth imitating")
    chosen: str | None = Field(None, description="the better of two responses; needs `rejected`")
    rejected: str | None = Field(None, description="the worse of two responses; needs `chosen`")
    group: str | None = Field(
        None, description="rows with the same value belong to the same stage; null: first turn"
    )
    dialogue: bool = Field(False, description="the prompt is text with Human: and Assistant: turns")

    def conflicts(self) -> Iterator[Conflict]:
        if (self.chosen is None) != (self.rejected is None):
            yield ("chosen", "rejected"), "chosen and rejected need each other: name both or none"
        if self.input is not None and self.holds_conversations:
            yield (
                ("input", "prompt"),
                f"{self.prompt} holds whole conversations, to which nothing is added: leave input out",
            )

    @property
    def holds_conversations(self) -> bool:
        """Whether one column holds a whole conversation: the prompt and its response."""
        return self.prompt in (self.response, self.chosen)

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        fields = (self.prompt, self.input, self.response, self.chosen, self.rejected, self.group)
        return list(dict.fromkeys(name for name in fields if name is not None))

    @property
    def has_pairs(self) -> bool:
        """Whether a reward model can learn from the rows."""
        return self.chosen is not None

    @property
    def has_responses(self) -> bool:
        """Whether an actor can imitate the rows' responses, or the chosen ones."""
        return self.response is not None or self.has_pairs


class Dataset(Section):
    """A dataset. If its columns are known, its name is enough."""

    name: DatasetName = Field(description="where the rows come from")
    revision: str = Field("main", pattern=f"^{REVISION}$", description="branch, tag or commit on the Hub")
    split: str = Field("train", min_length=1, description="the split that is read")
    subset: str | None = Field(
        None, min_length=1, description="a directory or the card's `config_name`, or a pattern, as `en*`"
    )
    encoding: Encoding = Field("utf-8", description="of JSON and CSV files, as Python names it")
    columns: Columns

    @model_validator(mode="before")
    @classmethod
    def _known_by_name(cls, value: Any) -> Any:
        """Accept a name as a dataset, and add the columns of a known one."""
        entry = {"name": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or "columns" in entry or "name" not in entry:
            return entry
        name = str(entry["name"])
        if mistake := catalog.unknown_dataset(name):
            raise ValueError(f"{name}: {mistake}")
        columns = catalog.known_columns(name)
        if columns is None:
            example = f"{{name: {name}, columns: {{prompt: question, response: answer}}}}"
            raise ValueError(
                f"the columns of {name} are not known: name them, for example {example}; for pairs name chosen"
                " and rejected instead of response"
            )
        return {**entry, "columns": columns}

    def conflicts(self) -> Iterator[Conflict]:
        yield from _foreign_revision("name", self.name, self.revision)


def _named_once(datasets: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
    names = [posixpath.normpath(d.name) if catalog.origin(d.name) == "local" else d.name for d in datasets]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is here more than once: name each dataset once")
    return datasets


Datasets = Annotated[
    tuple[Dataset, ...],
    Field(
        min_length=1, description="a list of names, or of {name, revision, split, subset, encoding, columns}"
    ),
    AfterValidator(_named_once),
]
