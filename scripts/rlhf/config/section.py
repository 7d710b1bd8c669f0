"""The base of every section of the configuration, and the types of its fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def _not_a_bool(value: object) -> object:
    """Refuse booleans for numbers: YAML 1.1 reads yes, no, on and off as booleans."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_not_a_bool)]
Float = Annotated[float, BeforeValidator(_not_a_bool)]
Conflict = tuple[tuple[str, ...], str]  # dotted names of fields that do not fit together; what to do


def not_one(section: BaseModel, first: str, second: str) -> Iterator[Conflict]:
    """Yield a conflict unless exactly one of two fields is given."""
    if (getattr(section, first) is None) == (getattr(section, second) is None):
        yield (first, second), f"give either {first} or {second} (the other one: null)"


def multiples(value: int, step: int) -> str:
    """Return the nearest multiples of `step` below and above `value`, as text."""
    below, above = value // step * step, math.ceil(value / step) * step
    return f"{below} or {above}" if below else str(above)


class Section(BaseModel):
    """A section of the configuration. It is frozen; unknown fields, NaN and infinities are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """Yield fields that are valid one by one and do not fit together."""
        yield from ()

    @model_validator(mode="after")
    def _without_conflicts(self) -> Section:
        lines = [
            InitErrorDetails(
                type=PydanticCustomError("conflict", "{message}", {"message": message, "fields": fields}),
                input=None,
            )
            for fields, message in self.conflicts()
        ]
        if lines:  # pydantic adds each to the other mistakes, with the section's location
            raise ValidationError.from_exception_data(type(self).__name__, lines)
        return self
