"""Layers of a configuration: scenarios as overrides on a base, and mistakes told in words.

Knows trees and pydantic models, not what is configured.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlhf.errors import ConfigError

Tree = dict[str, Any]
Layers = list[tuple[str, Tree]]  # (origin, overrides), the base first
Location = tuple[Any, ...]


def listing(errors: list[str]) -> str:
    """Return all mistakes as one text; what several scenarios inherit is told once."""
    told = list(dict.fromkeys(errors))
    count = f"{len(told)} mistake" + ("s" if len(told) > 1 else "")
    return f"{count} in the configuration:\n" + "\n".join(f"  - {e}" for e in told)


def chain_of(name: str, tree: Tree) -> Layers:
    """Return (origin, overrides) from `defaults` to the scenario itself."""
    scenarios, chain, seen = tree["scenarios"], [], []
    current: str | None = name
    while current is not None:
        seen.append(current)
        layer = scenarios.get(current)
        if layer is None and current in scenarios:
            layer = {}
        if not isinstance(layer, dict):
            known = ", ".join(map(str, scenarios))
            raise ConfigError(
                f"scenarios.{seen[-2] if len(seen) > 1 else name}: base {current!r}"
                f" is no scenario; there are: {known}"
                if current not in scenarios
                else f"scenarios.{current} = {layer!r}: should be a mapping"
            )
        chain.append((f"scenarios.{current}", {k: v for k, v in layer.items() if k != "base"}))
        current = layer.get("base")
        if not isinstance(current, str | None):
            raise ConfigError(f"scenarios.{seen[-1]}: base = {current!r}: should be a scenario's name")
        if current in seen:
            raise ConfigError(f"scenarios.{name}: base goes round: {' -> '.join([*seen, current])}")
    return [("defaults", tree.get("defaults") or {}), *reversed(chain)]


def merge(base: Tree, override: Tree) -> Tree:
    """Return `base` with `override` laid over it; mappings merge, all else replaces."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def mistakes(kind: type[BaseModel], name: str, merged: Tree, chain: Layers) -> list[str]:
    """Return every mistake of a scenario, in words; empty if `merged` is a valid `kind`.

    Checks of several fields run only on valid ones: where a field is wrong, they are run on the
    value below it as well.
    """
    try:
        kind.model_validate(merged)
    except ValidationError as error:
        found = error.errors()
        found += _beyond(kind, merged, chain, found)
        # A list is called too short where its items are wrong.
        deeper = {e["loc"][:n] for e in found for n in range(len(e["loc"]))}
        told = (e for e in found if not (e["type"] == "too_short" and e["loc"] in deeper))
        return [_sentence(kind, name, e, chain) for e in told]
    return []


def _beyond(kind: type[BaseModel], merged: Tree, chain: Layers, found: list[Any]) -> list[Any]:
    """Return mistakes of valid fields taken together that invalid ones beside them hide."""
    mended, told = copy.deepcopy(merged), [(e["loc"], e["msg"]) for e in found]
    fields = [e["loc"] for e in found if not isinstance(e["input"], dict)]
    if not all(_mend(mended, loc, chain) for loc in fields):
        return []
    try:
        kind.model_validate(mended)
    except ValidationError as error:
        news = (e for e in error.errors() if (e["loc"], e["msg"]) not in told)
        return [e for e in news if e["type"] == "value_error"]
    return []


def _mend(tree: Tree, loc: Location, chain: Layers) -> bool:
    """Put the value of a lower layer, or nothing for an unknown field, at `loc`; say whether it went."""
    *above, last = loc
    for part in above:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    if not isinstance(tree, dict):
        return False
    wrong = tree.pop(last, None)
    for _, layer in reversed(chain):
        node: Any = layer
        for part in loc:
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None and repr(node) != repr(wrong):  # True equals 1
            tree[last] = node
            return True
    return True


def _sentence(kind: type[BaseModel], name: str, error: Any, chain: Layers) -> str:
    """Say what is wrong, with which value, where it came from and what to do."""
    loc = error["loc"]
    if _origin(loc, chain) == "defaults" and loc and error["type"] != "missing":
        name = "every scenario"
    if error["type"] == "extra_forbidden":
        siblings = _fields_beside(kind, loc)
        return unknown(f"{name}: {_dotted(loc)}", error["input"], _origin(loc, chain), siblings)
    if error["type"] == "missing":
        help_ = _description(kind, loc)
        return f"{name}: {_dotted(loc)} is missing: set it in defaults or in the scenario{help_}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if isinstance(error["input"], dict):  # a check of a whole section: its message names the values
        return f"{name}: {_dotted(loc) or 'scenario'} (from {_origin(loc, chain)}): {message}"
    where = _origin(loc, chain)
    return f"{name}: {_dotted(loc)} = {error['input']!r} (from {where}): {message}{_description(kind, loc)}"


def unknown(field: str, value: object, origin: str, known: list[str]) -> str:
    close = difflib.get_close_matches(field.rsplit(".", 1)[-1], known, n=1)
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
