"""The life of gangs on a cluster: found, created, replaced, ended; never two that write to the same files."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path

from . import manifest, state, status
from .cluster import REQUEST_S, ApiError, Cluster, wait
from .entrypoint import POLL_S
from .mirror import Mirror
from .objects import LABEL_GANG, LABEL_WORKDIR_ID, TOKEN, WORKDIR, Json
from .spec import GangSpec

# A pod reads its token every POLL_S; a shared file system may return an old one for some time.
FENCE_S = 3 * POLL_S + 6
HELPER_TRIES = 5
CONFLICT_TRIES = 5
UNANSWERED_S = 15  # beyond a pod's grace period: its node does not respond


class ForeignObject(Exception):
    """An object that has the gang's name but belongs to somebody else."""


class Gangs:
    """All gangs of one working directory. `say` informs the user, `on_error` gets our bugs."""

    def __init__(
        self,
        cluster: Cluster,
        workdir_id: str,
        kinds: set[str],
        say: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ):
        self.cluster, self._say = cluster, say
        self._workdir_id, self._selector = workdir_id, f"{LABEL_WORKDIR_ID}={workdir_id}"
        mirrors = {k: Mirror(cluster, k, self._selector, LABEL_GANG, on_error) for k in ("Pod", *kinds)}
        self.pods, self.objects = mirrors.pop("Pod"), mirrors
        self._used: set[str] = set()  # names that this controller has requested

    def start(self) -> None:
        """Check that the credentials suffice, then watch.

        Raises:
            ApiError, Unreachable: at the start the API server must answer.
        """
        for kind in ("Pod", *self.objects):
            self.cluster.once("GET", self.cluster.path(kind), {"limit": 1})
        for mirror in self._mirrors():
            mirror.start()
        for mirror in self._mirrors():
            mirror.synced.wait(REQUEST_S)

    def stop(self) -> None:
        """Stop watching."""
        for mirror in self._mirrors():
            mirror.stop()

    def _mirrors(self) -> list[Mirror]:
        return [self.pods, *self.objects.values()]

    # -- look up ----------------------------------------------------------------------------

    def is_new(self, spec: GangSpec) -> bool:
        """Whether the cluster has nothing of this name, as far as we know without a request.

        The mirrors know what existed at the start; since then only this controller has created gangs
        here. If a dead controller's last request takes effect later, `create` finds out.
        """
        mirrors = self._mirrors()
        known = spec.name in self._used or any(mirror.of(spec.name) for mirror in mirrors)
        return all(mirror.synced.is_set() for mirror in mirrors) and not known

    def find(self, spec: GangSpec, kind: str = "") -> Json | None:
        """Return the gang of this name from the API server; `kind` if it is not the spec's.

        Raises:
            ForeignObject: somebody else uses the name.
        """
        self._used.add(spec.name)
        kind = kind or manifest.kind_of(spec)
        gang = self.cluster.get(kind, spec.name)
        if not gang:
            return None
        self._check_ours(kind, gang, spec)
        return {"kind": kind, **gang}

    def _check_ours(self, kind: str, gang: Json, spec: GangSpec) -> None:
        if gang["metadata"].get("labels", {}).get(LABEL_WORKDIR_ID) != self._workdir_id:
            raise ForeignObject(
                f"{kind} {spec.name} exists and does not belong to this working directory; delete it, or use another "
                "namespace"
            )
        theirs = gang["metadata"].get("annotations", {}).get(WORKDIR)
        if theirs and theirs != spec.annotations.get(WORKDIR):
            raise ForeignObject(
                f"{kind} {spec.name} was started from {theirs}. If that is this directory under another path, "
                f"start Snakemake there, or delete the {kind}; if this directory is a copy, remove "
                f"{Path(spec.state_dir).parent / state.IDENTITY_FILE}"
            )

    def read(self, gang: Json, nodes: int, without: Container[str] = ()) -> tuple[Json, status.Status]:
        """Return a gang's newest object and its status from the mirrors; `without`: uids of pods to ignore."""
        name, uid = gang["metadata"]["name"], gang["metadata"]["uid"]
        same = [obj for obj in self.objects[gang["kind"]].of(name) if obj["metadata"]["uid"] == uid]
        newest = (same or [gang])[0]
        pods = [pod for pod in self.pods_of(gang) if pod["metadata"]["uid"] not in without]
        return newest, status.read(newest, pods, nodes)

    def pods_of(self, gang: Json) -> list[Json]:
        """Return all pods that this gang ever had, without those of an earlier gang of its name."""
        created = gang["metadata"]["creationTimestamp"]
        pods = self.pods.of(gang["metadata"]["name"])
        return [
            pod for pod in pods if pod["metadata"]["creationTimestamp"] >= created and self._is_of(pod, gang)
        ]

    def _is_of(self, pod: Json, gang: Json) -> bool:
        owners = {owner["uid"] for owner in pod["metadata"].get("ownerReferences", [])}
        # The pods of a JobSet or TrainJob belong to a Job in between, whose name begins with the gang's.
        return gang["kind"] not in ("Job", "DeepSpeedJob") or gang["metadata"]["uid"] in owners

    def is_gone(self, gang: Json) -> bool:
        """Whether somebody has deleted the object; the server confirms it, because a mirror may be wrong."""
        return self.objects[gang["kind"]].is_gone(gang) and self._is_absent(gang)

    def _is_absent(self, gang: Json) -> bool:
        try:
            current = self.cluster.once("GET", self.cluster.path(gang["kind"], gang["metadata"]["name"]))
        except ApiError as error:
            return error.status == 404
        return bool(current["metadata"]["uid"] != gang["metadata"]["uid"])

    def end_elsewhere(self, spec: GangSpec) -> None:
        """End a gang of this name that was created with other options, where `find` does not look.

        Raises:
            ApiError: the cluster refuses it.
        """
        kind, namespace = state.last_creation(spec.state_dir)
        if namespace not in ("", self.cluster.namespace):
            self._say(
                f"{spec.name} was last created in the namespace {namespace}. If it still runs there, a file on the "
                "volume stops its pods"
            )
            self.fence(spec)
        elif kind not in ("", manifest.kind_of(spec)):
            other = self.find(spec, kind)
            if other:
                self._say(f"{spec.name} is replaced: it is a {kind}, created with another backend")
                self.remove(other, spec)

    # -- change -----------------------------------------------------------------------------

    def create(self, spec: GangSpec) -> Json:
        """Create a gang whose name is free, and return its object.

        Raises:
            ApiError: the cluster refuses it.
            ForeignObject: the name is not free after all.
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
                # A dead controller's last request took effect, or two requests changed one quota.
                earlier = self.find(spec)
                if earlier:
                    self.remove(earlier, spec)
        raise AssertionError("not reached")

    def _create_with_helpers(self, spec: GangSpec) -> Json:
        state.write_pod_files(spec)
        state.record_creation(spec.state_dir, manifest.kind_of(spec), self.cluster.namespace)
        *bodies, body = manifest.manifests(spec)
        helpers: list[Json] = []
        try:
            helpers = [self._create_helper(helper) for helper in bodies]
            gang = self._create_gang(body, spec.token, has_helpers=bool(helpers))
        except ApiError:
            for helper in helpers:
                self.cluster.delete(helper)
            raise
        self.adopt_helpers(gang, helpers)
        return gang

    def _create_gang(self, body: Json, token: str, *, has_helpers: bool) -> Json:
        """Create a gang's object. A webhook may not see a helper that has just been created."""
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
            # A request may have succeeded although its response was lost.
            existing = (
                self.cluster.get(body["kind"], body["metadata"]["name"]) if error.status == 409 else None
            )
            if existing and existing["metadata"].get("annotations", {}).get(TOKEN) == token:
                return {"kind": body["kind"], **existing}
            raise

    def _create_helper(self, body: Json) -> Json:
        orphan = self.cluster.get(body["kind"], body["metadata"]["name"])
        if orphan:  # its gang is gone or was never created
            self._delete_and_wait({"kind": body["kind"], **orphan})
        return self._create(body, body["metadata"]["annotations"][TOKEN])

    def adopt_helpers(self, gang: Json, helpers: list[Json]) -> None:
        """Make a gang the owner of its helpers, unless an earlier controller has done so."""
        for helper in helpers:
            if not helper["metadata"].get("ownerReferences"):
                self.cluster.set_owner(helper, gang)

    def helpers_of(self, spec: GangSpec) -> list[Json]:
        """Return the helpers of a gang that exist."""
        kinds = [body["kind"] for body in manifest.manifests(spec)[:-1]]
        helpers = [(kind, self.cluster.get(kind, spec.name)) for kind in kinds]
        return [{"kind": kind, **helper} for kind, helper in helpers if helper]

    def end(self, gang: Json) -> None:
        """Request a gang's deletion, once.

        Raises:
            ApiError, Unreachable: call again later.
        """
        mirror, uid = self.objects[gang["kind"]], gang["metadata"]["uid"]
        same = [obj for obj in mirror.of(gang["metadata"]["name"]) if obj["metadata"]["uid"] == uid]
        is_requested = any("deletionTimestamp" in obj["metadata"] for obj in same)
        if not is_requested and not mirror.is_gone(gang):
            self.cluster.delete(gang, patient=False)

    def delete(self, gang: Json) -> None:
        """Delete a finished gang; if the cluster refuses, its time limit or `gc` removes it."""
        with suppress(ApiError):
            self.cluster.delete(gang)

    def _delete_and_wait(self, obj: Json, limit_s: float = 60.0) -> None:
        self.cluster.delete(obj)
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            current = self.cluster.get(obj["kind"], obj["metadata"]["name"])
            if not current or current["metadata"]["uid"] != obj["metadata"]["uid"]:
                return
            time.sleep(0.2)

    def remove(self, gang: Json, spec: GangSpec) -> None:
        """Delete a gang and return when none of its pods can write any more."""
        self._delete_and_wait(gang)
        self._clear(spec)
        self.forget(spec.name)

    def _clear(self, spec: GangSpec) -> None:
        """Return when no pod of an earlier gang of this name can write, or has a name that is needed.

        A gang's object may be gone, or have failed, while some of its pods still run.
        """
        if not self._wait_for_pods(spec):
            self._say(f"{spec.name}: a pod's node does not respond; a file on the volume stops the pod")
            self.fence(spec)

    def fence(self, spec: GangSpec) -> None:
        """Stop pods that the cluster cannot reach, by a new token on the volume to which they write."""
        state.write_pod_files(spec)
        time.sleep(FENCE_S)
        for pod in self._remaining_pods(spec):
            self.cluster.delete(pod, grace_s=0)

    def _wait_for_pods(self, spec: GangSpec) -> bool:
        """Wait for the pods of a deleted gang to end; False if a node does not respond."""
        begin = time.monotonic()
        while pods := self._remaining_pods(spec):
            grace = max(pod["metadata"].get("deletionGracePeriodSeconds") or 0 for pod in pods)
            if time.monotonic() - begin > grace + UNANSWERED_S:
                return False
            time.sleep(0.2)
        return True

    def _remaining_pods(self, spec: GangSpec) -> list[Json]:
        """Pods that may still write; for a DeepSpeedJob ended pods as well, because their names are fixed."""
        pods = self.cluster.list_all("Pod", f"{self._selector},{LABEL_GANG}={spec.name}")
        names_are_fixed = manifest.kind_of(spec) == "DeepSpeedJob"
        ended = ("Succeeded", "Failed")
        return [pod for pod in pods if names_are_fixed or pod.get("status", {}).get("phase") not in ended]

    def forget(self, name: str) -> None:
        """Drop what the mirrors keep of a gang."""
        for mirror in self._mirrors():
            mirror.forget(name)
