"""A mirror of the objects of one kind that have our label: one LIST, then one WATCH."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from .cluster import ApiError, Cluster, Unreachable, wait
from .objects import Json


class Mirror(threading.Thread):
    """Keeps the last known state of every object of a kind, including deleted ones.

    Objects are looked up by the label `index`. Deleted objects are kept until `forget`: a pod that the
    cluster has removed may be the one that shows why its gang failed. An exception that ends the thread
    is our bug and goes to `on_error`; otherwise Snakemake would wait forever.
    """

    def __init__(
        self, cluster: Cluster, kind: str, selector: str, index: str, on_error: Callable[[Exception], None]
    ):
        super().__init__(name=f"mirror-{kind}", daemon=True)
        self._cluster, self._kind, self._selector, self._index = cluster, kind, selector, index
        self._on_error = on_error
        self._lock = threading.Lock()
        self._objects: dict[str, dict[str, Json]] = {}  # by the label's value, then by uid
        self._gone: set[str] = set()
        self._forgotten: set[str] = set()  # uids, until the objects are gone
        self._version = ""
        self._stopped = threading.Event()
        self.synced = threading.Event()
        self.on_change: Callable[[Json], None] = lambda obj: None  # called in this thread

    def of(self, key: str) -> list[Json]:
        """Return every object ever seen whose label has this value."""
        with self._lock:
            return list(self._objects.get(key, {}).values())

    def all(self) -> list[Json]:
        """Return every object ever seen."""
        with self._lock:
            return [obj for group in self._objects.values() for obj in group.values()]

    def is_gone(self, obj: Json) -> bool:
        """Whether the object has been deleted."""
        with self._lock:
            return obj["metadata"]["uid"] in self._gone

    def forget(self, key: str) -> None:
        """Drop all objects whose label has this value, and ignore their later changes."""
        with self._lock:
            uids = set(self._objects.pop(key, {}))
            self._forgotten |= uids - self._gone
            self._gone -= uids

    def stop(self) -> None:
        """End the thread after its current request."""
        self._stopped.set()

    def run(self) -> None:
        try:
            self._list_and_watch()
        except Exception as error:
            self._on_error(error)

    def _list_and_watch(self) -> None:
        attempt = 0
        while not self._stopped.is_set():
            try:
                items, self._version = self._cluster.list_version(self._kind, self._selector)
                self._replace_all(items)
                self.synced.set()
                self._watch()
            except ApiError as error:
                if error.status != 410:  # 410: our version is too old, so list again at once
                    wait(attempt, error.retry_after_s)
                    attempt += 1

    def _watch(self) -> None:
        """Watch from the last version, again and again; bookmarks keep the version fresh.

        Raises:
            ApiError: the server cannot watch from that version any more.
        """
        breaks = 0
        while not self._stopped.is_set():
            try:
                for change in self._cluster.watch(self._kind, self._selector, self._version):
                    breaks = 0
                    self._cluster.is_back()
                    self._apply(change)
            except Unreachable as error:
                if breaks:  # a single break is normal: idle connections are cut
                    self._cluster.is_away(str(error))
                wait(breaks)
                breaks += 1

    def _apply(self, change: Json) -> None:
        obj = {"kind": self._kind, **change["object"]}
        self._version = obj["metadata"]["resourceVersion"]
        if change["type"] != "BOOKMARK":
            self._put(obj, gone=change["type"] == "DELETED")
            self.on_change(obj)

    def _replace_all(self, items: Iterable[Json]) -> None:
        """Apply a complete list: objects that it lacks are gone."""
        items = list(items)
        present = {obj["metadata"]["uid"] for obj in items}
        with self._lock:
            self._gone |= {uid for group in self._objects.values() for uid in group} - present
            self._forgotten &= present
        for obj in items:
            self._put(obj, gone=False)

    def _put(self, obj: Json, *, gone: bool) -> None:
        obj["metadata"].pop("managedFields", None)  # half of an object's size, and unused
        key, uid = obj["metadata"].get("labels", {}).get(self._index, ""), obj["metadata"]["uid"]
        with self._lock:
            if uid in self._forgotten:
                self._forgotten -= {uid} if gone else set()
                return
            self._objects.setdefault(key, {})[uid] = obj
            if gone:
                self._gone.add(uid)
