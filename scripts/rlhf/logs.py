"""How a job ended, from its log."""

from __future__ import annotations

import re
from pathlib import Path

# A user's mistake, or the last line of a traceback; lines of other processes begin with their rank.
ERROR = re.compile(r"(\[rank\d+\]: *)?(error: |([\w.]+\.)?\w*(Error|Exception|Interrupt)\b)")
END = 50  # lines: the job survived errors further up


def last_words(log: Path) -> str:
    """Return the last line near the end of a log that names an error; its last line if none does."""
    if not log.exists():
        return "it left no log"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    end = [line for line in lines if line][-END:]
    return next((line for line in reversed(end) if ERROR.match(line)), end[-1] if end else "it said nothing")
