"""What the namespace tells about gangs that wait: warnings and Kueue's workloads.

One request for all gangs, every ten seconds at most and only when somebody asks: a thousand gangs that
wait cost no more than one.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from .cluster import ApiError, Cluster

Json = dict[str, Any]

EVERY_S = 10.0
# What controllers append to a gang's name begins after its hash.
GANG = re.compile(r"^(.*?-[0-9a-f]{10})(-|$)")


class News:
    def __init__(self, cluster: Cluster, say: Callable[[str], None]):
        self._cluster, self._say = cluster, say
        self._kept: dict[str, list[Json]] = {}
        self._read_at: dict[str, float] = {}
        self._warnings: dict[str, list[Json]] = {}

    def refresh(self) -> None:
        """Read anew when asked next: a gang has ended, and its last events count."""
        self._read_at.clear()

    def workloads(self) -> list[Json]:
        return self._list("Workload", "")

    def warnings(self, name: str, since: str) -> list[Json]:
        """Return warnings about a gang's objects since a time; older ones are of a namesake."""
        found = self._list("Event", "type=Warning")
        if found is not self._warnings.get("", None):
            self._warnings = {**_by_gang(found), "": found}
        return [event for event in self._warnings.get(name, []) if (_last(event) or since) >= since]

    def _list(self, kind: str, fields: str) -> list[Json]:
        """The objects of a kind, at most EVERY_S old; none where they may not be read."""
        if time.monotonic() - self._read_at.get(kind, -EVERY_S) < EVERY_S:
            return self._kept[kind]
        query = {"fieldSelector": fields} if fields else {}
        try:
            self._kept[kind] = self._cluster.once("GET", self._cluster.path(kind), query)["items"]
        except ApiError as error:
            if kind not in self._kept:
                self._say(f"{kind}s cannot be read, so some reasons stay unknown: {error}")
            self._kept[kind] = []
        self._read_at[kind] = time.monotonic()
        return self._kept[kind]


def _by_gang(events: list[Json]) -> dict[str, list[Json]]:
    found = defaultdict(list)
    for event in events:
        name = GANG.match(event.get("involvedObject", {}).get("name", ""))
        if name:
            found[name.group(1)].append(event)
    return found


def _last(event: Json) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")
