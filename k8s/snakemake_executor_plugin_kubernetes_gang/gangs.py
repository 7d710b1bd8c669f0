"""The life of gangs on a cluster: found, created, replaced, ended; one writer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import manifest, place, status
from .cluster import REQUEST_S, ApiError, Cluster, wait
from .entrypoint import POLL_S
from .mirror import Mirror
from .spec import GangSpec

Json = dict[str, Any]

# A pod looks at its token every POLL_S; a shared file system may show it an old one for some time.
FENCE_S = 3 * POLL_S + 6
HELPER_TRIES = 5
CONFLICT_TRIES = 5
UNANSWERED_S = 15  # beyond a pod's grace period: its node does not answer


class Foreign(Exception):
    """An object of the gang's name that is not ours."""


class Gangs:
    """All gangs of one working directory. `say` tells the user what is done, `failed` hears of our bugs."""

    def __init__(
        self,
        cluster: Cluster,
        place: str,
        kinds: set[str],
        say: Callable[[str], None],
        failed: Callable[[Exception], None],
    ):
        self.cluster, self.place, self._say = cluster, place, say
        selector = f"{manifest.LABEL_PLACE}={place}"
        self.pods = Mirror(cluster, "Pod", selector, manifest.LABEL_GANG, failed)
        self.objects = {kind: Mirror(cluster, kind, selector, manifest.LABEL_GANG, failed) for kind in kinds}
        self._used: set[str] = set()  # names that this controller has asked for

    def start(self) -> None:
        """Check that the credentials suffice, then watch.

        Raises:
            ApiError, Unreachable: at the start the API must be there.
        """
        for kind in ("Pod", *self.objects):
            self.cluster.once("GET", self.cluster.path(kind), {"limit": 1})
        for mirror in self._mirrors():
            mirror.start()
        for mirror in self._mirrors():
            mirror.synced.wait(REQUEST_S)

    def stop(self) -> None:
        for mirror in self._mirrors():
            mirror.stop()

    def _mirrors(self) -> list[Mirror]:
        return [self.pods, *self.objects.values()]

    # -- looking ----------------------------------------------------------------------------

    def is_new(self, spec: GangSpec) -> bool:
        """Whether nothing of this name is in the cluster, as far as can be told without asking it.

        The mirrors know what was there at the start; since then only we have made gangs here. What a
        dead controller's last request makes after that is found by `create`.
        """
        mirrors = self._mirrors()
        known = spec.name in self._used or any(mirror.of(spec.name) for mirror in mirrors)
        return all(mirror.synced.is_set() for mirror in mirrors) and not known

    def find(self, spec: GangSpec, kind: str = "") -> Json | None:
        """Return the gang of this name, as the API server has it now; of another `kind` than the spec's.

        Raises:
            Foreign: the name is taken by somebody else.
        """
        self._used.add(spec.name)
        kind = kind or manifest.kind_of(spec)
        found = self.cluster.get(kind, spec.name)
        if not found:
            return None
        self._check_ours(kind, found, spec)
        return {"kind": kind, **found}

    def _check_ours(self, kind: str, found: Json, spec: GangSpec) -> None:
        if found["metadata"].get("labels", {}).get(manifest.LABEL_PLACE) != self.place:
            raise Foreign(
                f"{kind} {spec.name} exists and is not of this working directory; delete it, or use another namespace"
            )
        theirs = found["metadata"].get("annotations", {}).get(manifest.WORKDIR)
        if theirs and theirs != spec.annotations.get(manifest.WORKDIR):
            raise Foreign(
                f"{kind} {spec.name} was started from {theirs}. If that is this directory under another path, "
                f"start Snakemake there, or delete the {kind}; if this one is a copy, remove "
                f"{Path(spec.state_dir).parent}/place"
            )

    def read(self, gang: Json, nodes: int, without: Container[str] = ()) -> tuple[Json, status.Status]:
        """Return a gang's newest object and status, as the mirrors have them; `without`: uids of pods."""
        name, uid = gang["metadata"]["name"], gang["metadata"]["uid"]
        newest = [thing for thing in self.objects[gang["kind"]].of(name) if thing["metadata"]["uid"] == uid]
        pods = [pod for pod in self.pods_of(gang) if pod["metadata"]["uid"] not in without]
        return (newest or [gang])[0], status.read((newest or [gang])[0], pods, nodes)

    def pods_of(self, gang: Json) -> list[Json]:
        """Return all pods this very gang ever had, not those of a predecessor of its name."""
        born = gang["metadata"]["creationTimestamp"]
        pods = self.pods.of(gang["metadata"]["name"])
        return [
            pod for pod in pods if pod["metadata"]["creationTimestamp"] >= born and self._is_of(pod, gang)
        ]

    def _is_of(self, pod: Json, gang: Json) -> bool:
        owners = {owner["uid"] for owner in pod["metadata"].get("ownerReferences", [])}
        # A JobSet's or TrainJob's pods belong to a Job in between; its name begins with the gang's.
        return gang["kind"] not in ("Job", "DeepSpeedJob") or gang["metadata"]["uid"] in owners

    def is_gone(self, gang: Json) -> bool:
        """Whether somebody has deleted the object; asked twice, a mirror may be late."""
        return self.objects[gang["kind"]].is_gone(gang) and self._has_vanished(gang)

    def _has_vanished(self, gang: Json) -> bool:
        try:
            found = self.cluster.once("GET", self.cluster.path(gang["kind"], gang["metadata"]["name"]))
        except ApiError as error:
            return error.status == 404
        return bool(found["metadata"]["uid"] != gang["metadata"]["uid"])

    def end_elsewhere(self, spec: GangSpec) -> None:
        """End a gang of this name that other options have made, where `find` does not look.

        Raises:
            ApiError: the cluster refuses it.
        """
        kind, namespace = place.last(spec.state_dir)
        if namespace not in ("", self.cluster.namespace):
            self._say(
                f"{spec.name} was last made in the namespace {namespace}: should it run there still, its pods are "
                "told through the volume to stop"
            )
            self.fence(spec)
        elif kind not in ("", manifest.kind_of(spec)):
            left = self.find(spec, kind)
            if left:
                self._say(f"{spec.name} is replaced: it is a {kind}, made with another backend")
                self.remove(left, spec)

    # -- doing ------------------------------------------------------------------------------

    def create(self, spec: GangSpec) -> Json:
        """Create a gang whose name is free, and return its object.

        Raises:
            ApiError: the cluster refuses it.
            Foreign: the name is not free after all.
        """
        if not self.is_new(spec):
            self._clear(spec)
        self._used.add(spec.name)
        for attempt in range(CONFLICT_TRIES):
            try:
                return self._create_with_helpers(spec)
            except ApiError as error:
                if error.status != 409 or attempt == CONFLICT_TRIES - 1:
                    raise
                # A dead controller's last request has made it, or two requests wrote to one quota.
                left = self.find(spec)
                if left:
                    self.remove(left, spec)
        raise AssertionError("not reached")

    def _create_with_helpers(self, spec: GangSpec) -> Json:
        write_state(spec)
        place.note(spec.state_dir, manifest.kind_of(spec), self.cluster.namespace)
        *helpers, body = manifest.manifests(spec)
        made = []
        try:
            made = [self._create_helper(helper) for helper in helpers]
            gang = self._create_gang(body, spec.token, has_helpers=bool(made))
        except ApiError:
            for helper in made:
                self.cluster.delete(helper)
            raise
        self.adopt_helpers(gang, made)
        return gang

    def _create_gang(self, body: Json, token: str, *, has_helpers: bool) -> Json:
        """Create a gang's object. A webhook may not have seen a helper that was made a moment ago."""
        for attempt in range(HELPER_TRIES):
            try:
                return self._create(body, token)
            except ApiError as error:
                if not has_helpers or "not found" not in error.message or attempt == HELPER_TRIES - 1:
                    raise
                wait(attempt)
        raise AssertionError("not reached")

    def _create(self, body: Json, token: str) -> Json:
        self.cluster.create(body, dry_run=True)
        try:
            return {"kind": body["kind"], **self.cluster.create(body)}
        except ApiError as error:
            # A request whose answer was lost may have done its work.
            found = self.cluster.get(body["kind"], body["metadata"]["name"]) if error.status == 409 else None
            if found and found["metadata"].get("annotations", {}).get(manifest.TOKEN) == token:
                return {"kind": body["kind"], **found}
            raise

    def _create_helper(self, body: Json) -> Json:
        left = self.cluster.get(body["kind"], body["metadata"]["name"])
        if left:  # its gang is gone or was never made
            self._delete_and_wait({"kind": body["kind"], **left})
        return self._create(body, body["metadata"]["annotations"][manifest.TOKEN])

    def adopt_helpers(self, gang: Json, helpers: list[Json]) -> None:
        """Give a gang's helpers to it. A controller may have died before."""
        for helper in helpers:
            if not helper["metadata"].get("ownerReferences"):
                self.cluster.own(helper, gang)

    def helpers_of(self, spec: GangSpec) -> list[Json]:
        bodies = manifest.manifests(spec)[:-1]
        found = [(body["kind"], self.cluster.get(body["kind"], spec.name)) for body in bodies]
        return [{"kind": kind, **thing} for kind, thing in found if thing]

    def end(self, gang: Json) -> None:
        """Ask once for a gang's deletion, where it has not been.

        Raises:
            ApiError, Unreachable: ask again later.
        """
        newest = self.objects[gang["kind"]].of(gang["metadata"]["name"])
        asked = any(
            "deletionTimestamp" in t["metadata"]
            for t in newest
            if t["metadata"]["uid"] == gang["metadata"]["uid"]
        )
        if not asked and not self.objects[gang["kind"]].is_gone(gang):
            self.cluster.delete(gang, patient=False)

    def delete(self, gang: Json) -> None:
        """Delete a gang that is done with; one that may not be is left to its time limit and to `gc`."""
        with suppress(ApiError):
            self.cluster.delete(gang)

    def _delete_and_wait(self, thing: Json, limit_s: float = 60.0) -> None:
        self.cluster.delete(thing)
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            now = self.cluster.get(thing["kind"], thing["metadata"]["name"])
            if not now or now["metadata"]["uid"] != thing["metadata"]["uid"]:
                return
            time.sleep(0.2)

    def remove(self, gang: Json, spec: GangSpec) -> None:
        """Delete a gang and return when none of its pods can write any more."""
        self._delete_and_wait(gang)
        self._clear(spec)
        self.forget(spec.name)

    def _clear(self, spec: GangSpec) -> None:
        """Return when no pod of an earlier gang of this name can write, or holds a name that is needed.

        A gang's object may be gone, or have failed, while pods of it still end.
        """
        if not self._wait_for_pods(spec):
            self._say(
                f"{spec.name}: a pod's node does not answer; the pod is told through the volume to stop"
            )
            self.fence(spec)

    def fence(self, spec: GangSpec) -> None:
        """Stop pods that the cluster cannot reach: by their token, on the volume that they write to."""
        write_state(spec)
        time.sleep(FENCE_S)
        for pod in self._pods_left(spec):
            self.cluster.delete(pod, grace_s=0)

    def _wait_for_pods(self, spec: GangSpec) -> bool:
        """Wait while pods of a deleted gang end; False if a node does not answer."""
        begun = time.monotonic()
        while left := self._pods_left(spec):
            grace = max(pod["metadata"].get("deletionGracePeriodSeconds") or 0 for pod in left)
            if time.monotonic() - begun > grace + UNANSWERED_S:
                return False
            time.sleep(0.2)
        return True

    def _pods_left(self, spec: GangSpec) -> list[Json]:
        """Pods that may still write; of a DeepSpeedJob also ended ones, for their names are fixed."""
        pods = self.cluster.list_all(
            "Pod", f"{manifest.LABEL_PLACE}={self.place},{manifest.LABEL_GANG}={spec.name}"
        )
        names_are_fixed = manifest.kind_of(spec) == "DeepSpeedJob"
        ended = ("Succeeded", "Failed")
        return [pod for pod in pods if names_are_fixed or pod.get("status", {}).get("phase") not in ended]

    def forget(self, name: str) -> None:
        """Drop what the mirrors keep of a gang."""
        for mirror in self._mirrors():
            mirror.forget(name)


def write_state(spec: GangSpec) -> None:
    """Write what pods read from the volume."""
    for name, text in manifest.files(spec).items():
        place.write_whole(Path(spec.state_dir, name), text)
