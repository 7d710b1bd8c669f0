"""Layers of a configuration: scenarios as overrides on a base, and mistakes told in words.

Knows trees and pydantic models, not what is configured.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Tree = dict[str, Any]
Layers = list[tuple[str, Tree]]  # (origin, overrides), the base first
Location = tuple[Any, ...]

WORDS = {  # for those of pydantic's that name Python's types, and not what to write
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "string_type": "should be a string",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}


def listing(errors: list[str]) -> str:
    """Return all mistakes as one text; what several scenarios inherit is told once."""
    told = list(dict.fromkeys(errors))
    count = f"{len(told)} mistake" + ("s" if len(told) > 1 else "")
    return f"{count} in the configuration:\n" + "\n".join(f"  - {e}" for e in told)


def chain_of(name: str, scenarios: Tree) -> tuple[Layers, str | None]:
    """Return (origin, overrides) from a scenario's lowest base to itself, and why there is no lower one.

    The reason is None where the chain is whole.
    """
    chain: Layers = []
    seen: list[str] = []
    current: Any = name
    while True:
        layer = {} if scenarios[current] is None else scenarios[current]
        if not isinstance(layer, dict):
            return chain, f"scenarios.{current} = {layer!r}: should be a mapping"
        seen.append(current)
        chain.insert(0, (f"scenarios.{current}", {k: v for k, v in layer.items() if k != "base"}))
        current = layer.get("base")
        if current is None:
            return chain, None
        if why := _no_base(seen, current, scenarios):
            return chain, why


def _no_base(seen: list[str], base: Any, scenarios: Tree) -> str | None:
    if not isinstance(base, str):
        return f"scenarios.{seen[-1]}: base = {base!r}: should be a scenario's name"
    if base in seen:
        return f"scenarios.{seen[0]}: circular base: {' -> '.join([*seen, base])}"
    if base in scenarios:
        return None
    known = [str(name) for name in scenarios]
    close = difflib.get_close_matches(base, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"scenarios.{seen[-1]}: base = {base!r}: no such scenario; {hint}"


def merge(base: Tree, override: Tree) -> Tree:
    """Return `base` with `override` laid over it; mappings merge, all else replaces."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def merged(chain: Layers) -> Tree:
    """Return all layers of a chain, each laid over those before it."""
    return functools.reduce(merge, (layer for _, layer in chain), {})


def mistakes(kind: type[BaseModel], name: str, chain: Layers, whole: bool) -> list[str]:
    """Return every mistake of a scenario, in words; empty if its layers make a valid `kind`.

    Of a chain that is not `whole`, what lacks or does not go together may be its gap's fault, and is not told.

    Pydantic asks whether fields go together only where each is right. So wrong ones are told, a lower
    layer's values take their place, and the whole is asked again; nothing is told of those values.
    """
    said = merged(chain)
    tree, told, mended = _unshared(said), [], set[Location]()
    while found := _errors(kind, tree):
        told += [e for e in found if e not in told and not _covers(mended, _fields(e))]
        places = {_mend(tree, f, chain, e["type"] == "conflict") for e in found for f in _fields(e)}
        if places <= mended | {()}:
            break
        mended |= places - {()}
    # A list is called too short where its items are wrong.
    deeper = {e["loc"][:n] for e in told for n in range(len(e["loc"]))}
    told = [e for e in told if not (e["type"] == "too_short" and e["loc"] in deeper)]
    told = [e for e in told if whole or e["type"] not in ("missing", "conflict")]
    return [_sentence(kind, name, e, said, chain) for e in told]


def _errors(kind: type[BaseModel], tree: Tree) -> list[Any]:
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        return [_of_the_list(e) for e in error.errors()]
    return []


def _of_the_list(error: Any) -> Any:
    """Return a mistake, that of a list which lacks an item as the list's: pydantic calls it the item's."""
    loc = error["loc"]
    if error["type"] != "missing" or not isinstance(loc[-1], int):
        return error
    words = f"should have at least {loc[-1] + 1} items, not {len(error['input'])}"
    return {**error, "type": "too_short", "loc": loc[:-1], "msg": words}


def _fields(error: Any) -> list[Location]:
    """Return the fields that a mistake is about: several if they do not go together."""
    if error["type"] != "conflict":
        return [error["loc"]]
    return [(*error["loc"], *field.split(".")) for field in error["ctx"]["fields"]]


def _covers(mended: set[Location], fields: list[Location]) -> bool:
    return any(field[: len(place)] == place for field in fields for place in mended)


def _mend(tree: Tree, loc: Location, chain: Layers, keeps: bool) -> Location:
    """Put a lower layer's value, or nothing if none has one, at `loc`; return the place, a list's as a whole.

    `keeps` leaves what the lowest layer says, and returns ().
    """
    inner = (n for n in range(1, len(loc)) if not isinstance(_at(tree, loc[:n]), dict))
    loc = loc[: next(inner, len(loc))]
    section = _at(tree, loc[:-1])
    lower = list(itertools.takewhile(lambda layer: layer[0] != _origin(loc, chain), chain))
    if keeps and not lower:
        return ()
    section.pop(loc[-1], None)
    if values := [value for _, layer in lower if (value := _at(layer, loc)) is not None]:
        section[loc[-1]] = _unshared(values[0])
    return loc


def _unshared(node: Any) -> Any:
    """Copy mappings, so that what YAML's aliases made one can be changed in one place."""
    return {key: _unshared(value) for key, value in node.items()} if isinstance(node, dict) else node


def _at(node: Any, loc: Location) -> Any:
    """Return the value at `loc` of a tree, None where there is none."""
    for part in loc:
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def _sentence(kind: type[BaseModel], name: str, error: Any, tree: Tree, chain: Layers) -> str:
    """Say what is wrong, with which value, where it came from and what to do."""
    loc = error["loc"]
    fields = {field: _origin(field, chain) for field in _fields(error)}
    if len(origins := set(fields.values())) == 1 and loc and error["type"] != "missing":
        name = {"defaults": "every scenario"}.get(origin := origins.pop(), origin.removeprefix("scenarios."))
    if error["type"] in ("extra_forbidden", "invalid_key"):  # the latter: a number in a name's place
        siblings = _fields_beside(kind, loc)
        return unknown(f"{name}: {_dotted(loc)}", _at(tree, loc), fields[loc], siblings)
    if error["type"] == "missing":
        help_ = _description(kind, loc)
        return f"{name}: {_dotted(loc)} is missing: set it in defaults or in the scenario{help_}"
    if error["type"] == "conflict":
        values = ", ".join(
            ", ".join(f"{_dotted(field)} = {_at(tree, field)!r}" for field in group) + f" (from {origin})"
            for origin, group in itertools.groupby(fields, key=fields.__getitem__)
        )
        return f"{name}: {values}: {error['msg']}"
    return f"{name}: {_dotted(loc)}{_wrong_value(kind, error, fields[loc])}"


def _wrong_value(kind: type[BaseModel], error: Any, origin: str) -> str:
    """Say which value a field has, and what it should be."""
    loc, words, own = error["loc"], _words(kind, error), error["type"] == "value_error"
    if own and isinstance(error["input"], dict):  # a check of a whole section: its message names the values
        return f" (from {origin}): {words}"
    # An item of a list is told with the list's meaning, but for our own checks, which say all.
    meant = loc[:-1] if len(loc) > 1 and isinstance(loc[-1], int) and not own else loc
    return f" = {error['input']!r} (from {origin}): {words}{_description(kind, meant)}"


def _words(kind: type[BaseModel], error: Any) -> str:
    """Say what a value should be."""
    plain = re.sub(r"^(Value error, |(Input|Tuple|String) (?=should))| after validation", "", error["msg"])
    words = WORDS.get(error["type"], plain)
    section = _section_of(kind, error["loc"]) if error["type"] == "model_type" else None
    return f"{words} with {', '.join(section.model_fields)}" if section else words


def unknown(field: str, value: object, origin: str, known: list[str]) -> str:
    close = difflib.get_close_matches(re.split(r"[. ]", field)[-1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{field} = {value!r} (from {origin}): no such field; {hint}"


def _dotted(loc: Location) -> str:
    return ".".join(str(part) for part in loc)


def _origin(loc: Location, chain: Layers) -> str:
    """Name the last layer that says something at `loc`, be it null."""
    for origin, layer in reversed(chain):
        node: Any = layer
        for part in loc:
            if not isinstance(node, dict):  # a list, or a section set to null: nothing below is inherited
                return origin
            if part not in node:
                break
            node = node[part]
        else:
            return origin
    return "defaults"


def _section_of(section: type[BaseModel], loc: Location) -> type[BaseModel] | None:
    for part in loc:
        if isinstance(part, int):  # an item of a list, whose section we are in
            continue
        field = section.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:
            return None
        section = sections[0]
    return section


def _fields_beside(kind: type[BaseModel], loc: Location) -> list[str]:
    section = _section_of(kind, loc[:-1])
    return list(section.model_fields) if section else []


def _description(kind: type[BaseModel], loc: Location) -> str:
    section = _section_of(kind, loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    return f" ({field.description})" if field and field.description else ""
