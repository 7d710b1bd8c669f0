"""The Kubernetes API: requests that survive outages of the API server.

The official client is only the transport; objects are plain JSON. The client's models validate responses
and drop fields that they do not know, which breaks with other versions of the API.
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

from .objects import RESOURCES, Json

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAGE = 500
REQUEST_S = 30
WATCH_S = 240
PERMISSION_TRIES = 6  # ten seconds: an API server that has just started does not know its roles yet
TRANSIENT = (429, 500, 502, 503, 504)
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, OSError)


class ApiError(Exception):
    """An error response of the API server: HTTP status, reason and message."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float = 0.0):
        super().__init__(f"{message} (HTTP {status} {reason})")
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


class Unreachable(Exception):
    """The API server does not answer."""


class Cluster:
    """One namespace of one cluster. `say` reports the beginning and the end of each outage."""

    def __init__(self, context: str | None, namespace: str | None, say: Callable[[str], None]):
        self._context = context
        self._say = say
        self._lock = threading.Lock()
        self._away_since = 0.0
        self.requests = 0
        self._api, default_namespace = self._load()
        self.namespace = namespace or default_namespace

    def _load(self) -> tuple[client.ApiClient, str]:
        """A client and its default namespace: KUBECONFIG or a context, else in-cluster, else ~/.kube.

        In-cluster precedes the home directory, which may be on a volume and belong to another cluster.
        """
        settings = client.Configuration()
        settings.retries = False
        settings.connection_pool_maxsize = 64
        try:
            if not self._context and not os.environ.get("KUBECONFIG") and SERVICE_ACCOUNT.exists():
                config.load_incluster_config(client_configuration=settings)
                return client.ApiClient(settings), (SERVICE_ACCOUNT / "namespace").read_text().strip()
            # Passed, because the client reads the variable only when it is imported.
            file = os.environ.get("KUBECONFIG")
            config.load_kube_config(file, self._context, client_configuration=settings)
            contexts, active = config.list_kube_config_contexts(file)
            active = next((entry for entry in contexts if entry["name"] == self._context), active)
        except config.ConfigException as error:
            raise Unreachable(
                f"no access to a cluster: {str(error).rstrip('.')}. Set KUBECONFIG, or run where a ServiceAccount is mounted."
            ) from error
        return client.ApiClient(settings), (active or {}).get("context", {}).get("namespace") or "default"

    def path(self, kind: str, name: str = "") -> str:
        """Return the path of an object, or of all objects of a kind in the namespace."""
        version, plural = RESOURCES[kind]
        root = "apis" if "/" in version else "api"  # the core group has no name
        return "/".join(filter(None, (f"/{root}/{version}/namespaces/{self.namespace}", plural, name)))

    # -- one request ------------------------------------------------------------------------

    def _send(
        self, method: str, path: str, query: Mapping[str, Any], body: Any, content: str, timeout: Any
    ) -> Any:
        """Send a request and return the response, not read yet.

        Raises:
            Unreachable: the credentials cannot be read, for example while a token's file is replaced.
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
            method,
            url,
            headers=headers,
            body=None if body is None else json.dumps(body),
            preload_content=False,
            timeout=timeout,
            redirect=False,
        )

    def once(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        *,
        content: str = "application/json",
    ) -> Json:
        """Send one request and return the response.

        Raises:
            ApiError: the server answers with an error.
            Unreachable: it does not answer.
        """
        try:
            timeout = urllib3.Timeout(connect=5, read=REQUEST_S)
            response = self._send(method, path, query or {}, body, content, timeout)
            text = response.data
            response.release_conn()
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"{method} {path}: {error}") from error
        if response.status >= 400:
            raise _api_error(response.status, response.headers, text)
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
        """Like `once`, but retry until the server answers: an outage of the API must not fail a job.

        Raises:
            ApiError: an error that waiting does not resolve.
        """
        for attempt in range(10**9):
            try:
                response = self.once(method, path, query, body, content=content)
                self.is_back()
                return response
            except ApiError as error:
                self.is_back()
                if error.status == 401 and attempt % 2 == 0:
                    self._reload()
                elif error.status not in (401, *TRANSIENT) and not (
                    _lacks_permission(error) and attempt < PERMISSION_TRIES
                ):
                    raise
                if attempt == 2:
                    self._say(f"the API server cannot serve a request, retrying: {error}")
                wait(attempt, error.retry_after_s)
            except Unreachable as error:
                self.is_away(str(error))
                wait(attempt)
        raise AssertionError("not reached")

    def _reload(self) -> None:
        """Read the credentials again, because tokens expire and are replaced."""
        try:
            self._api, _ = self._load()
        except Unreachable as error:
            self._say(f"the credentials cannot be read again, retrying: {error}")

    @property
    def is_down(self) -> bool:
        """Whether the API server did not answer the last request."""
        return bool(self._away_since)

    def is_away(self, reason: str) -> None:
        """Note that the API server does not answer, and report it once per outage."""
        with self._lock:
            if not self._away_since:
                self._away_since = time.monotonic()
                self._say(
                    f"the API server does not answer; waiting for it, running gangs continue ({reason})"
                )

    def is_back(self) -> None:
        """Note that the API server answers, and report the end of an outage."""
        with self._lock:
            if self._away_since:
                self._say(f"the API server answers again after {time.monotonic() - self._away_since:.0f} s")
                self._away_since = 0.0

    # -- objects ----------------------------------------------------------------------------

    def create(self, body: Json, *, dry_run: bool = False) -> Json:
        """Create an object, or only validate it, and return it as the server has it."""
        query = {"fieldManager": "kubernetes-gang", "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        return self.request("POST", self.path(body["kind"]), query, body)

    def get(self, kind: str, name: str) -> Json | None:
        """Return an object, None if there is none of this name."""
        try:
            return self.request("GET", self.path(kind, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_all(self, kind: str, selector: str = "", fields: str = "") -> list[Json]:
        """Return the objects of a kind that match the label and field selectors."""
        return list(self._pages(kind, selector, fields))[-1][0]

    def _pages(self, kind: str, selector: str, fields: str) -> Iterator[tuple[list[Json], str]]:
        """Yield all objects so far after each page, with the resource version of the list."""
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
        """Return the objects of a kind, and the resource version from which to watch them."""
        return list(self._pages(kind, selector, ""))[-1]

    def delete(self, obj: Json, *, grace_s: int | None = None, patient: bool = True) -> None:
        """Delete this object, but not a new one of the same name; the object may be gone already.

        Raises:
            ApiError: it may not be deleted.
            Unreachable: the server does not answer, and `patient` is False.
        """
        body: Json = {"preconditions": {"uid": obj["metadata"]["uid"]}, "propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            send = self.request if patient else self.once
            send("DELETE", self.path(obj["kind"], obj["metadata"]["name"]), None, body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def set_owner(self, obj: Json, owner: Json) -> None:
        """Make `owner` the owner of `obj`, so that it is deleted with it."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        body = {"metadata": {"uid": obj["metadata"]["uid"], "ownerReferences": [reference]}}
        path = self.path(obj["kind"], obj["metadata"]["name"])
        self.request("PATCH", path, None, body, content="application/merge-patch+json")

    def log(self, pod: str, container: str, **query: Any) -> Any:
        """Open a pod's log and return the response, which the caller reads and closes.

        Raises:
            ApiError: the server or the node refuses.
            Unreachable: the server does not answer.
        """
        path, query = self.path("Pod", pod) + "/log", {"container": container, **query}
        timeout = urllib3.Timeout(connect=5, read=WATCH_S if query.get("follow") else REQUEST_S)
        try:
            response = self._send("GET", path, query, None, "application/json", timeout)
            if response.status >= 400:
                raise _api_error(response.status, response.headers, response.data)
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"log of {pod}: {error}") from error
        return response

    def watch(self, kind: str, selector: str, version: str) -> Iterator[Json]:
        """Yield changes since `version` until the server ends the watch.

        Raises:
            ApiError: the server refuses; with status 410 if the version is too old.
            Unreachable: the connection broke.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": int(WATCH_S * random.uniform(0.8, 1.0)),
            **({"labelSelector": selector} if selector else {}),
        }
        # Longer than the server's own timeout: it ends the watch only if the peer died silently.
        timeout = urllib3.Timeout(connect=5, read=WATCH_S + 30)
        response = None
        try:
            response = self._send("GET", self.path(kind), query, None, "application/json", timeout)
            if response.status >= 400:
                raise _api_error(response.status, response.headers, response.data)
            for line in _lines(response):
                change = _parsed(line)
                if change["type"] == "ERROR":
                    end = change["object"]
                    raise ApiError(end.get("code", 500), end.get("reason", ""), end.get("message", ""))
                yield change
        except CONNECTION_ERRORS as error:
            raise Unreachable(f"watch of {kind}: {error}") from error
        finally:
            if response is not None:
                response.close()


def wait(attempt: int, least_s: float = 0.0) -> None:
    """Wait before the next attempt: longer each time, up to ten seconds, times a random factor."""
    time.sleep(max(least_s, min(10.0, 0.25 * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)))


def _lacks_permission(error: ApiError) -> bool:
    """Whether a role is missing; quotas and admission refuse with the same status."""
    return error.status == 403 and " cannot " in error.message


def _lines(response: Any) -> Iterator[bytes]:
    pending = b""
    for chunk in response.stream(amt=None, decode_content=True):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from (line for line in lines if line)


def _parsed(text: bytes) -> Json:
    """The object in a response.

    Raises:
        Unreachable: it has none, so it does not come from an API server.
    """
    try:
        obj = json.loads(text)
    except ValueError:
        obj = None
    if not isinstance(obj, dict) or not obj.keys() & {"metadata", "type"}:
        start = text.decode(errors="replace")[:80]
        raise Unreachable(f"the response is not an API server's: {start!r}; is there a proxy in between?")
    return obj


def _api_error(status: int, headers: Mapping[str, str], text: bytes) -> ApiError:
    try:
        body = json.loads(text)
        reason, message = body.get("reason", ""), body.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", text.decode(errors="replace")[:500]
    after = headers.get("Retry-After", "0")
    return ApiError(status, reason, message, float(after) if after.isdigit() else 0.0)
