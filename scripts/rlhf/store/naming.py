"""Names of artefacts: a hash of their inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.files import walk


def key(spec: Mapping[str, Any]) -> str:
    """Return the hash that names an artefact (12 hex digits).

    Args:
        spec: everything that decides the content, as JSON values: stage, configuration, the seed if the
            stage draws random numbers, `parents` (role -> path of an artefact that it is built from) and
            `code` (digest of the code that makes it).
    """
    return _digest(spec)


def fingerprint(path: Path) -> str:
    """Return a hash that changes with a file or directory, without reading its content (12 hex digits).

    It covers the name, size and modification time of every file, so an edited file gives another
    artefact. All paths that do not exist have the same fingerprint.
    """
    files = walk(path) if path.is_dir() else [path] if path.is_file() else []
    return _digest([(p.relative_to(path.parent).parts[1:], *_size_and_time(p)) for p in files])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
