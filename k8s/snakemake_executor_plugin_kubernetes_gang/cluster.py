"""The Kubernetes API: requests that outlast its absence, and mirrors of our objects.

The official client is the transport; objects are plain JSON. Its models check what servers answer
and drop fields they do not know, which breaks with every other version.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config

Json = dict[str, Any]

KINDS = {
    "Pod": ("api/v1", "pods"),
    "Service": ("api/v1", "services"),
    "Event": ("api/v1", "events"),
    "Job": ("apis/batch/v1", "jobs"),
    "JobSet": ("apis/jobset.x-k8s.io/v1alpha2", "jobsets"),
    "TrainJob": ("apis/trainer.kubeflow.org/v1alpha1", "trainjobs"),
    "TrainingRuntime": ("apis/trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
    "DeepSpeedJob": ("apis/batch.tensorstack.dev/v1beta1", "deepspeedjobs"),
    "Workload": ("apis/kueue.x-k8s.io/v1beta1", "workloads"),
}
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAGE = 500
REQUEST_S = 30
WATCH_S = 240
RIGHTS_TRIES = 6  # ten seconds: an API server that has just started does not know its roles yet
TRANSIENT = (429, 500, 502, 503, 504)
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, OSError)


class ApiError(Exception):
    """An answer of the API server that is an error: HTTP status, reason and its own words."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float = 0.0):
        super().__init__(f"{message} (HTTP {status} {reason})")
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


class Unreachable(Exception):
    """The API server does not answer."""


class Cluster:
    """One namespace of one cluster. `say` hears once when the API goes away and when it is back."""

    def __init__(self, context: str | None, namespace: str | None, say: Callable[[str], None]):
        self._context = context
        self._say = say
        self._lock = threading.Lock()
        self._away_since = 0.0
        self.requests = 0
        self._api, found = self._load()
        self.namespace = namespace or found

    def _load(self) -> tuple[client.ApiClient, str]:
        """A client and its default namespace: KUBECONFIG or a context, else in-cluster, else ~/.kube.

        In-cluster goes before the home directory: a volume's home may hold the credentials of elsewhere.
        """
        settings = client.Configuration()
        settings.retries = False
        settings.connection_pool_maxsize = 64
        try:
            if not self._context and not os.environ.get("KUBECONFIG") and SERVICE_ACCOUNT.exists():
                config.load_incluster_config(client_configuration=settings)
                return client.ApiClient(settings), (SERVICE_ACCOUNT / "namespace").read_text().strip()
            # Named, for the client looks at the variable only once, when it is imported.
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(file, self._context, client_configuration=settings)
            contexts, active = config.list_kube_config_contexts(file)
            active = next((found for found in contexts if found["name"] == self._context), active)
        except config.ConfigException as error:
            raise Unreachable(
                f"no access to a cluster: {str(error).rstrip('.')}. Set KUBECONFIG, or run where a ServiceAccount is mounted."
            ) from error
        return client.ApiClient(settings), (active or {}).get("context", {}).get("namespace") or "default"

    def path(self, kind: str, name: str = "") -> str:
        group, plural = KINDS[kind]
        return "/".join(filter(None, (f"/{group}/namespaces/{self.namespace}", plural, name)))

    # -- one request ------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, query: Mapping[str, Any], body: Any, content: str, timeout: Any
    ) -> Any:
        """Send a request and return the response, still to be read.

        Raises:
            Unreachable: there are no credentials, as while a token's file is being replaced.
        """
        settings = self._api.configuration
        headers = {"Accept": "application/json, */*", "Content-Type": content}
        try:
            bearer = settings.auth_settings().get("BearerToken")
        except config.ConfigException as error:
            raise Unreachable(f"{method} {path}: the credentials cannot be read: {error}") from error
        if bearer:
            headers["authorization"] = bearer["value"]
        url = settings.host + path + (f"?{urlencode(query)}" if query else "")
        self.requests += 1
        return self._api.rest_client.pool_manager.request(
            method, url, headers=headers, body=None if body is None else json.dumps(body),
            preload_content=False, timeout=timeout, redirect=False,
        )  # fmt: skip

    def once(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        *,
        content: str = "application/json",
    ) -> Json:
        """Send one request and return what it answers.

        Raises:
            ApiError: the server answers with an error.
            Unreachable: it does not answer.
        """
        try:
            answer = self._send(
                method, path, query or {}, body, content, urllib3.Timeout(connect=5, read=REQUEST_S)
            )
            text = answer.data
            answer.release_conn()
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"{method} {path}: {error}") from error
        if answer.status >= 400:
            raise _api_error(answer.status, answer.headers, text)
        return _parsed(text) if text else {}

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        *,
        content: str = "application/json",
    ) -> Json:
        """Like `once`, but wait until the server can answer: an API that is away is nobody's failure.

        Raises:
            ApiError: an answer that waiting does not change.
        """
        for attempt in range(10**9):
            try:
                answer = self.once(method, path, query, body, content=content)
                self.is_back()
                return answer
            except ApiError as error:
                self.is_back()
                if error.status == 401 and attempt % 2 == 0:
                    self._reload()
                elif error.status not in (401, *TRANSIENT) and not (
                    _lacks_right(error) and attempt < RIGHTS_TRIES
                ):
                    raise
                if attempt == 2:
                    self._say(f"the API server cannot do what is asked, trying on: {error}")
                wait(attempt, error.retry_after_s)
            except Unreachable as error:
                self.is_away(str(error))
                wait(attempt)
        raise AssertionError("not reached")

    def _reload(self) -> None:
        """Read the credentials again: tokens of ServiceAccounts and logins rotate."""
        try:
            self._api, _ = self._load()
        except Unreachable as error:
            self._say(f"credentials cannot be read again: {error}")

    @property
    def is_down(self) -> bool:
        """Whether the API server did not answer when last asked."""
        return bool(self._away_since)

    def is_away(self, why: str) -> None:
        """Say once that the API is away."""
        with self._lock:
            if not self._away_since:
                self._away_since = time.monotonic()
                self._say(f"the API server does not answer, waiting for it; running gangs go on ({why})")

    def is_back(self) -> None:
        with self._lock:
            if self._away_since:
                self._say(f"the API server answers again after {time.monotonic() - self._away_since:.0f} s")
                self._away_since = 0.0

    # -- objects ----------------------------------------------------------------------------

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        query = {"fieldManager": "kubernetes-gang", "fieldValidation": "Strict"} | (
            {"dryRun": "All"} if dry_run else {}
        )
        return self.request("POST", self.path(body["kind"]), query, body)

    def get(self, kind: str, name: str) -> Json | None:
        try:
            return self.request("GET", self.path(kind, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_all(self, kind: str, selector: str = "", fields: str = "") -> list[Json]:
        return list(self._pages(kind, selector, fields))[-1][0]

    def _pages(self, kind: str, selector: str, fields: str) -> Iterator[tuple[list[Json], str]]:
        """All objects so far, page by page, with the resource version of the list."""
        items: list[Json] = []
        query = {
            "limit": PAGE,
            **({"labelSelector": selector} if selector else {}),
            **({"fieldSelector": fields} if fields else {}),
        }
        while True:
            page = self.request("GET", self.path(kind), query)
            items += [{"kind": kind, **item} for item in page["items"]]
            query["continue"] = page["metadata"].get("continue", "")
            yield items, page["metadata"]["resourceVersion"]
            if not query["continue"]:
                return

    def list_version(self, kind: str, selector: str) -> tuple[list[Json], str]:
        return list(self._pages(kind, selector, ""))[-1]

    def delete(self, thing: Json, *, grace_s: int | None = None, patient: bool = True) -> None:
        """Delete this very object, never a successor of its name; it may be gone already.

        Raises:
            ApiError: it may not be deleted.
            Unreachable: no answer, unless `patient`.
        """
        body: Json = {"preconditions": {"uid": thing["metadata"]["uid"]}, "propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            send = self.request if patient else self.once
            send("DELETE", self.path(thing["kind"], thing["metadata"]["name"]), None, body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def own(self, thing: Json, owner: Json) -> None:
        """Make `owner` the owner of `thing`, so that one deletion takes both."""
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        body = {"metadata": {"uid": thing["metadata"]["uid"], "ownerReferences": [reference]}}
        self.request(
            "PATCH",
            self.path(thing["kind"], thing["metadata"]["name"]),
            None,
            body,
            content="application/merge-patch+json",
        )

    def log(self, pod: str, container: str, **query: Any) -> Any:
        """Open a pod's log: a response to read from and to close.

        Raises:
            ApiError: the server or the node refuses.
            Unreachable: no answer.
        """
        path = self.path("Pod", pod) + "/log"
        read_s = WATCH_S if query.get("follow") else REQUEST_S
        try:
            answer = self._send(
                "GET",
                path,
                {"container": container, **query},
                None,
                "application/json",
                urllib3.Timeout(connect=5, read=read_s),
            )
            if answer.status >= 400:
                raise _api_error(answer.status, answer.headers, answer.data)
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"log of {pod}: {error}") from error
        return answer

    def watch(self, kind: str, selector: str, version: str) -> Iterator[Json]:
        """Yield changes since `version` until the server ends the watch.

        Raises:
            ApiError: also 410, when the version is too old.
            Unreachable: the connection broke.
        """
        query = {
            "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version,
            "timeoutSeconds": int(WATCH_S * random.uniform(0.8, 1.0)), **({"labelSelector": selector} if selector else {}),
        }  # fmt: skip
        # The read timeout is longer than the server's: a peer that died without a word ends it.
        timeout = urllib3.Timeout(connect=5, read=WATCH_S + 30)
        answer = None
        try:
            answer = self._send("GET", self.path(kind), query, None, "application/json", timeout)
            if answer.status >= 400:
                raise _api_error(answer.status, answer.headers, answer.data)
            for line in _lines(answer):
                change = _parsed(line)
                if change["type"] == "ERROR":
                    found = change["object"]
                    raise ApiError(found.get("code", 500), found.get("reason", ""), found.get("message", ""))
                yield change
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"watch of {kind}: {error}") from error
        finally:
            if answer is not None:
                answer.close()


def wait(attempt: int, least_s: float = 0.0) -> None:
    """Wait before the next attempt: longer each time, up to ten seconds, never in step with others."""
    time.sleep(max(least_s, min(10.0, 0.25 * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)))


def _lacks_right(error: ApiError) -> bool:
    """Whether roles refuse a request; quotas and admission refuse with the same status."""
    return error.status == 403 and " cannot " in error.message


def _lines(answer: Any) -> Iterator[bytes]:
    pending = b""
    for chunk in answer.stream(amt=None, decode_content=True):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line for line in lines if line)


def _parsed(text: bytes) -> Json:
    """Return an answer's object.

    Raises:
        Unreachable: it is none, so somebody else has answered.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & {"metadata", "type"}:
        start = text.decode(errors="replace")[:80]
        raise Unreachable(f"the answer is not an API server's but {start!r}; is there a proxy in between?")
    return found


def _api_error(status: int, headers: Mapping[str, str], text: bytes) -> ApiError:
    try:
        body = json.loads(text)
        reason, message = body.get("reason", ""), body.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", text.decode(errors="replace")[:500]
    after = headers.get("Retry-After", "0")
    return ApiError(status, reason, message, float(after) if after.isdigit() else 0.0)
