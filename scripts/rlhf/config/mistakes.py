"""Mistakes of a configuration, as sentences: what is wrong, the value, where it came from, what to do.

This module knows trees and pydantic models. It does not know what is configured.
"""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlhf.config.overrides import Layers, Tree, merged

Location = tuple[Any, ...]  # path of a field in a tree: keys, and indices of lists
Schema = type[BaseModel]

# In place of pydantic's messages that name Python's types.
WORDS = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "string_type": "should be a string",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}


def listing(errors: list[str]) -> str:
    """Return all mistakes as one text; a mistake that several scenarios inherit appears once."""
    distinct = list(dict.fromkeys(errors))
    count = f"{len(distinct)} mistake" + ("s" if len(distinct) > 1 else "")
    return f"{count} in the configuration:\n" + "\n".join(f"  - {e}" for e in distinct)


def mistakes(schema: Schema, name: str, chain: Layers, complete: bool) -> list[str]:
    """Return every mistake of a scenario as a sentence; empty if its layers make a valid `schema`.

    Pydantic checks that fields fit together only once each of them is valid. So invalid values are
    reported and replaced by those of a lower layer, and the tree is validated again, until nothing new
    appears. Mistakes of the replacements are not reported.

    Args:
        name: the scenario's name.
        chain: its layers, the lowest first.
        complete: whether the chain reaches `defaults`. If not, missing fields and conflicts may be due
            to the gap, and are not reported.
    """
    written = merged(chain)
    tree, errors, repaired = _unshared(written), [], set[Location]()
    while new := _errors(schema, tree):
        errors += [e for e in new if e not in errors and not _covers(repaired, _fields(e))]
        locations = {
            _repair(tree, field, chain, e["type"] == "conflict") for e in new for field in _fields(e)
        }
        if locations <= repaired | {()}:
            break
        repaired |= locations - {()}
    # Pydantic leaves out invalid items, and then calls their list too short.
    sections = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
    errors = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in sections)]
    errors = [e for e in errors if complete or e["type"] not in ("missing", "conflict")]
    return [_sentence(schema, name, e, written, chain) for e in errors]


def _errors(schema: Schema, tree: Tree) -> list[Any]:
    try:
        schema.model_validate(tree)
    except ValidationError as error:
        return [_of_the_list(e) for e in error.errors()]
    return []


def _of_the_list(error: Any) -> Any:
    """Return a missing item as a mistake of its list: pydantic reports it at the item."""
    loc = error["loc"]
    if error["type"] != "missing" or not isinstance(loc[-1], int):
        return error
    words = f"should have at least {loc[-1] + 1} items, not {len(error['input'])}"
    return {**error, "type": "too_short", "loc": loc[:-1], "msg": words}


def _fields(error: Any) -> list[Location]:
    """Return the fields that a mistake is about: several if they do not fit together."""
    if error["type"] != "conflict":
        return [error["loc"]]
    return [(*error["loc"], *field.split(".")) for field in error["ctx"]["fields"]]


def _covers(repaired: set[Location], fields: list[Location]) -> bool:
    """Return whether one of the fields is in a repaired section."""
    return any(field[: len(loc)] == loc for field in fields for loc in repaired)


def _repair(tree: Tree, loc: Location, chain: Layers, keep_lowest: bool) -> Location:
    """Replace the value at `loc` by a lower layer's, or remove it if no layer has one.

    Return the location that was repaired: a list is replaced as one value. With `keep_lowest` a value
    of the lowest layer stays, and the result is ().
    """
    inner = (n for n in range(1, len(loc)) if not isinstance(_at(tree, loc[:n]), dict))
    loc = loc[: next(inner, len(loc))]
    section = _at(tree, loc[:-1])
    lower = list(itertools.takewhile(lambda layer: layer[0] != _origin(loc, chain), chain))
    if keep_lowest and not lower:
        return ()
    section.pop(loc[-1], None)
    if values := [value for _, layer in lower if (value := _at(layer, loc)) is not None]:
        section[loc[-1]] = _unshared(values[0])
    return loc


def _unshared(node: Any) -> Any:
    """Copy mappings: YAML's aliases share them, and a repair changes one location only."""
    return {key: _unshared(value) for key, value in node.items()} if isinstance(node, dict) else node


def _at(node: Any, loc: Location) -> Any:
    """Return the value at `loc` of a tree, or None if there is none."""
    for part in loc:
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def _sentence(schema: Schema, name: str, error: Any, tree: Tree, chain: Layers) -> str:
    """Say what is wrong, with which value, where it came from and what to do."""
    loc = error["loc"]
    fields = {field: _origin(field, chain) for field in _fields(error)}
    if len(origins := set(fields.values())) == 1 and loc and error["type"] != "missing":
        name = {"defaults": "every scenario"}.get(origin := origins.pop(), origin.removeprefix("scenarios."))
    if error["type"] in ("extra_forbidden", "invalid_key"):  # the latter: a key that is a number
        siblings = _fields_beside(schema, loc)
        return unknown_field(f"{name}: {_dotted(loc)}", _at(tree, loc), fields[loc], siblings)
    if error["type"] == "missing":
        meaning = _description(schema, loc)
        return f"{name}: {_dotted(loc)} is missing: set it in defaults or in the scenario{meaning}"
    if error["type"] == "conflict":
        values = ", ".join(
            ", ".join(f"{_dotted(field)} = {_at(tree, field)!r}" for field in group) + f" (from {origin})"
            for origin, group in itertools.groupby(fields, key=fields.__getitem__)
        )
        return f"{name}: {values}: {error['msg']}"
    return f"{name}: {_dotted(loc)}{_invalid_value(schema, error, fields[loc])}"


def _invalid_value(schema: Schema, error: Any, origin: str) -> str:
    """Say which value a field has, and what it should be."""
    loc, words, own = error["loc"], _words(schema, error), error["type"] == "value_error"
    if own and isinstance(error["input"], dict):  # a check of a whole section: its message names the values
        return f" (from {origin}): {words}"
    # A list's items have no description of their own. Messages of our own checks need none.
    described = loc[:-1] if len(loc) > 1 and isinstance(loc[-1], int) and not own else loc
    return f" = {error['input']!r} (from {origin}): {words}{_description(schema, described)}"


def _words(schema: Schema, error: Any) -> str:
    """Say what a value should be."""
    plain = re.sub(r"^(Value error, |(Input|Tuple|String) (?=should))| after validation", "", error["msg"])
    words = WORDS.get(error["type"], plain)
    section = _section_of(schema, error["loc"]) if error["type"] == "model_type" else None
    return f"{words} with {', '.join(section.model_fields)}" if section else words


def unknown_field(field: str, value: object, origin: str, known: list[str]) -> str:
    """Say that a field does not exist, and which one may be meant.

    Args:
        field: its dotted name, perhaps with a scenario before it.
        origin: where the value was written.
        known: the fields that exist there.
    """
    close = difflib.get_close_matches(re.split(r"[. ]", field)[-1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{field} = {value!r} (from {origin}): no such field; {hint}"


def _dotted(loc: Location) -> str:
    return ".".join(str(part) for part in loc)


def _origin(loc: Location, chain: Layers) -> str:
    """Name the last layer that sets `loc`, also to null."""
    for origin, layer in reversed(chain):
        node: Any = layer
        for part in loc:
            if not isinstance(node, dict):  # a list, or a section set to null: it hides lower layers
                return origin
            if part not in node:
                break
            node = node[part]
        else:
            return origin
    return "defaults"


def _section_of(section: Schema, loc: Location) -> Schema | None:
    """Return the section at `loc`, or None if a field there is no section."""
    for part in loc:
        if isinstance(part, int):  # an item of a list, whose section this is already
            continue
        field = section.model_fields.get(str(part))
        annotations = (field.annotation, *get_args(field.annotation)) if field else ()
        sections = [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]
        if not sections:
            return None
        section = sections[0]
    return section


def _fields_beside(schema: Schema, loc: Location) -> list[str]:
    section = _section_of(schema, loc[:-1])
    return list(section.model_fields) if section else []


def _description(schema: Schema, loc: Location) -> str:
    section = _section_of(schema, loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    return f" ({field.description})" if field and field.description else ""
