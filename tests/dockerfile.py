"""What envs/Dockerfile gives to a program in the training image."""

from __future__ import annotations

import re
from pathlib import Path

DOCKERFILE = Path(__file__).parents[1] / "envs" / "Dockerfile"


def environment() -> dict[str, str]:
    """The variables of its ENV, on top of those of the base."""
    [text] = re.findall(r"^ENV ((?:.*\\\n)*.*)", DOCKERFILE.read_text(), flags=re.MULTILINE)
    values = dict(pair.split("=", 1) for pair in text.replace("\\\n", " ").split())
    return values | {"PATH": values["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")}
