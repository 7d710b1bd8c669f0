"""Scenarios as overrides: each one overrides its base, and the lowest overrides `defaults`."""

from __future__ import annotations

import difflib
import functools
from typing import Any

Tree = dict[str, Any]
Layers = list[tuple[str, Tree]]  # (origin, overrides), the base first


def chain_of(name: str, scenarios: Tree) -> tuple[Layers, str | None]:
    """Return (origin, overrides) from a scenario's lowest base to itself, and what is wrong with its bases.

    The mistake is None if every base is found; else the chain starts above the invalid base.
    """
    chain: Layers = []
    names: list[str] = []
    current: Any = name
    while True:
        layer = {} if scenarios[current] is None else scenarios[current]
        if not isinstance(layer, dict):
            return chain, f"scenarios.{current} = {layer!r}: should be a mapping"
        names.append(current)
        chain.insert(0, (f"scenarios.{current}", {k: v for k, v in layer.items() if k != "base"}))
        current = layer.get("base")
        if current is None:
            return chain, None
        if mistake := _invalid_base(names, current, scenarios):
            return chain, mistake


def _invalid_base(names: list[str], base: Any, scenarios: Tree) -> str | None:
    """Return why `base` cannot be the base of the last of `names`, or None if it can."""
    if not isinstance(base, str):
        return f"scenarios.{names[-1]}: base = {base!r}: should be a scenario's name"
    if base in names:
        return f"scenarios.{names[0]}: circular base: {' -> '.join([*names, base])}"
    if base in scenarios:
        return None
    known = [str(name) for name in scenarios]
    close = difflib.get_close_matches(base, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"scenarios.{names[-1]}: base = {base!r}: no such scenario; {hint}"


def merge(base: Tree, override: Tree) -> Tree:
    """Return `base` overridden by `override`: mappings are merged, other values replaced."""
    result = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def merged(chain: Layers) -> Tree:
    """Return the layers of a chain as one tree; each overrides those before it."""
    return functools.reduce(merge, (layer for _, layer in chain), {})
