"""JSON, one value per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the values of a file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write one value per line, keys as they come."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line(value) for value in values)


def line(value: dict[str, Any]) -> str:
    """Return one line of such a file."""
    return json.dumps(value, ensure_ascii=False) + "\n"
