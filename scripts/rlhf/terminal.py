"""A model's text, made safe for a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Replace control characters except line ends and tabs: a model may sample any, and terminals obey them."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
