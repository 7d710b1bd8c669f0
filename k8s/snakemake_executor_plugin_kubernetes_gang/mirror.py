"""A mirror of the objects of one kind that carry our label: one LIST, then one WATCH."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from .cluster import ApiError, Cluster, Unreachable, wait

Json = dict[str, Any]


class Mirror(threading.Thread):
    """Keeps the last known state of every object of a kind, also of those that are gone.

    `index` names the label by which objects are looked up. Gone objects are kept until `forget`:
    a pod that the cluster has taken away may be the one that says why its gang failed. `failed` hears of
    the exception that ends the thread, which is our bug: Snakemake would wait for ever.
    """

    def __init__(
        self, cluster: Cluster, kind: str, selector: str, index: str, failed: Callable[[Exception], None]
    ):
        super().__init__(name=f"mirror-{kind}", daemon=True)
        self._cluster, self._kind, self._selector, self._index = cluster, kind, selector, index
        self._failed = failed
        self._lock = threading.Lock()
        self._objects: dict[str, dict[str, Json]] = {}
        self._gone: set[str] = set()
        self._forgotten: set[str] = set()  # until they are gone
        self._version = ""
        self._stopped = threading.Event()
        self.synced = threading.Event()
        self.changed: Callable[[Json], None] = lambda thing: None  # hears of every change, in this thread

    def of(self, key: str) -> list[Json]:
        """Return every object ever seen with this value of the label."""
        with self._lock:
            return list(self._objects.get(key, {}).values())

    def all(self) -> list[Json]:
        with self._lock:
            return [thing for group in self._objects.values() for thing in group.values()]

    def is_gone(self, thing: Json) -> bool:
        with self._lock:
            return thing["metadata"]["uid"] in self._gone

    def forget(self, key: str) -> None:
        with self._lock:
            uids = set(self._objects.pop(key, {}))
            self._forgotten |= uids - self._gone
            self._gone -= uids

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        try:
            self._keep_up()
        except Exception as error:
            self._failed(error)

    def _keep_up(self) -> None:
        attempt = 0
        while not self._stopped.is_set():
            try:
                items, self._version = self._cluster.list_version(self._kind, self._selector)
                self._replace(items)
                self.synced.set()
                self._follow()
            except ApiError as error:
                if error.status != 410:  # 410: our version is too old, the list starts anew
                    wait(attempt, error.retry_after_s)
                    attempt += 1

    def _follow(self) -> None:
        """Watch on and on from the last version, which bookmarks keep fresh.

        Raises:
            ApiError: nothing is to be had from that version any more.
        """
        breaks = 0
        while not self._stopped.is_set():
            try:
                for change in self._cluster.watch(self._kind, self._selector, self._version):
                    breaks = 0
                    self._cluster.is_back()
                    self._take(change)
            except Unreachable as error:
                if breaks:  # once is nothing: connections that are idle are cut
                    self._cluster.is_away(str(error))
                wait(breaks)
                breaks += 1

    def _take(self, change: Json) -> None:
        thing = {"kind": self._kind, **change["object"]}
        self._version = thing["metadata"]["resourceVersion"]
        if change["type"] != "BOOKMARK":
            self._put(thing, gone=change["type"] == "DELETED")
            self.changed(thing)

    def _replace(self, items: Iterable[Json]) -> None:
        """Take over a whole list: what it does not hold is gone."""
        items = list(items)
        present = {thing["metadata"]["uid"] for thing in items}
        with self._lock:
            self._gone |= {uid for group in self._objects.values() for uid in group} - present
            self._forgotten &= present
        for thing in items:
            self._put(thing, gone=False)

    def _put(self, thing: Json, *, gone: bool) -> None:
        thing["metadata"].pop("managedFields", None)  # half of an object, and nobody reads it
        key, uid = thing["metadata"].get("labels", {}).get(self._index, ""), thing["metadata"]["uid"]
        with self._lock:
            if uid in self._forgotten:
                self._forgotten -= {uid} if gone else set()
                return
            self._objects.setdefault(key, {})[uid] = thing
            if gone:
                self._gone.add(uid)
