"""Why gangs wait, as the namespace reports it: warning events and Kueue's workloads.

One request serves all gangs, at most every ten seconds and only when it is needed: a thousand waiting
gangs cost as much as one.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from . import status, waits
from .cluster import ApiError, Cluster
from .objects import Json

MAX_AGE_S = 10.0
# Controllers append to a gang's name; the name itself ends with a hash.
GANG = re.compile(r"^(.*?-[0-9a-f]{10})(-|$)")
JOB_UID = "kueue.x-k8s.io/job-uid"


class Evidence:
    """Caches the warnings and workloads of all gangs."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None]):
        self._cluster, self._say = cluster, say
        self._cache: dict[str, dict[str, list[Json]]] = {}
        self._read_at: dict[str, float] = {}

    def refresh(self) -> None:
        """Read again at the next call: after a gang has ended, its last events matter."""
        self._read_at.clear()

    def workloads(self, uid: str) -> list[Json]:
        """Return Kueue's workloads of the object with this uid."""
        return self._grouped("Workload", "", _owner_uid).get(uid, [])

    def warnings(self, name: str, since: str) -> list[Json]:
        """Return warnings about a gang since a time; older ones belong to an earlier gang of this name."""
        events = self._grouped("Event", "type=Warning", _gang_name).get(name, [])
        return [event for event in events if waits.last_seen(event) >= status.seconds(since)]

    def _grouped(self, kind: str, fields: str, key: Callable[[Json], str]) -> dict[str, list[Json]]:
        """Objects of a kind by `key`, at most MAX_AGE_S old; none if they may not be read."""
        if time.monotonic() - self._read_at.get(kind, -MAX_AGE_S) >= MAX_AGE_S:
            self._cache[kind] = _group(self._read(kind, fields), key)
            self._read_at[kind] = time.monotonic()
        return self._cache[kind]

    def _read(self, kind: str, fields: str) -> list[Json]:
        query = {"fieldSelector": fields} if fields else {}
        try:
            items: list[Json] = self._cluster.once("GET", self._cluster.path(kind), query)["items"]
        except ApiError as error:
            if kind not in self._cache:
                self._say(f"{kind}s cannot be read, so some reasons for waiting stay unknown: {error}")
            return []
        return items


def _group(items: Iterable[Json], key: Callable[[Json], str]) -> dict[str, list[Json]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _owner_uid(workload: Json) -> str:
    return str(workload["metadata"].get("labels", {}).get(JOB_UID, ""))


def _gang_name(event: Json) -> str:
    match = GANG.match(event.get("involvedObject", {}).get("name", ""))
    return match.group(1) if match else ""
