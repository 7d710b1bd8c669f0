"""What the namespace tells about gangs that wait: warnings and Kueue's workloads.

One request for all gangs, every ten seconds at most and only when somebody asks: a thousand gangs that
wait cost no more than one.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from . import status, waits
from .cluster import ApiError, Cluster

Json = dict[str, Any]

EVERY_S = 10.0
# What controllers append to a gang's name begins after its hash.
GANG = re.compile(r"^(.*?-[0-9a-f]{10})(-|$)")
JOB_UID = "kueue.x-k8s.io/job-uid"


class News:
    def __init__(self, cluster: Cluster, say: Callable[[str], None]):
        self._cluster, self._say = cluster, say
        self._kept: dict[str, dict[str, list[Json]]] = {}
        self._read_at: dict[str, float] = {}

    def refresh(self) -> None:
        """Read anew when asked next: a gang has ended, and its last events count."""
        self._read_at.clear()

    def workloads(self, uid: str) -> list[Json]:
        """Return Kueue's workloads of the object with this uid."""
        return self._about("Workload", "", _owner_uid).get(uid, [])

    def warnings(self, name: str, since: str) -> list[Json]:
        """Return warnings about a gang since a time; older ones are of a namesake."""
        found = self._about("Event", "type=Warning", _gang_name).get(name, [])
        return [event for event in found if waits.last_seen(event) >= status.seconds(since)]

    def _about(self, kind: str, fields: str, key: Callable[[Json], str]) -> dict[str, list[Json]]:
        """The objects of a kind by `key`, at most EVERY_S old; none where they may not be read."""
        if time.monotonic() - self._read_at.get(kind, -EVERY_S) >= EVERY_S:
            self._kept[kind] = _by(key, self._read(kind, fields))
            self._read_at[kind] = time.monotonic()
        return self._kept[kind]

    def _read(self, kind: str, fields: str) -> list[Json]:
        query = {"fieldSelector": fields} if fields else {}
        try:
            found: list[Json] = self._cluster.once("GET", self._cluster.path(kind), query)["items"]
        except ApiError as error:
            if kind not in self._kept:
                self._say(f"{kind}s cannot be read, so some reasons stay unknown: {error}")
            return []
        return found


def _by(key: Callable[[Json], str], things: Iterable[Json]) -> dict[str, list[Json]]:
    found = defaultdict(list)
    for thing in things:
        found[key(thing)].append(thing)
    return found


def _owner_uid(workload: Json) -> str:
    return str(workload["metadata"].get("labels", {}).get(JOB_UID, ""))


def _gang_name(event: Json) -> str:
    found = GANG.match(event.get("involvedObject", {}).get("name", ""))
    return found.group(1) if found else ""
