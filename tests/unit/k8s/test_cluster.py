"""The API client and the mirror under faults that a healthy server does not produce on demand."""

from __future__ import annotations

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from kubernetes.config import ConfigException

from snakemake_executor_plugin_kubernetes_gang import __main__ as gc
from snakemake_executor_plugin_kubernetes_gang import cluster as api
from snakemake_executor_plugin_kubernetes_gang.cluster import ApiError, Cluster, Unreachable
from snakemake_executor_plugin_kubernetes_gang.mirror import Mirror


class Server(ThreadingHTTPServer):
    """Sends the responses of `script`, one per request: (status, headers, body); "drop" closes the connection."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen = [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self.server.seen.append((self.command, self.path, self.headers.get("authorization")))
        step = self.server.script.pop(0)
        if step == "drop":
            self.connection.close()
            return
        status, headers, body = step
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cluster(server, tmp_path, monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: 0.1)
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    write_token(path, server, "first")
    said = []
    cluster = Cluster(None, None, said.append)
    cluster.said, cluster.path_of_config = said, path
    return cluster


def write_token(path, server, token):
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "x",
                "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "x", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "here"}}],
            }
        )
    )


OK = (200, {}, {"metadata": {"name": "x"}})


def error(status, reason="", message="no", **headers):
    return (status, headers, {"kind": "Status", "reason": reason, "message": message, "code": status})


def test_an_overloaded_server_is_retried_after_the_time_that_it_names(server, cluster):
    server.script[:] = [error(429, **{"Retry-After": "1"}), OK]
    begun = time.monotonic()
    assert cluster.get("Job", "x") == OK[2]
    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("fault", [error(500), error(503), error(504), "drop"])
def test_temporary_faults_are_retried(server, cluster, fault):
    server.script[:] = [fault, fault, OK]
    assert cluster.get("Job", "x") == OK[2]


def test_the_beginning_and_the_end_of_an_outage_are_reported_once(server, cluster):
    server.script[:] = ["drop", "drop", "drop", OK]
    cluster.get("Job", "x")
    assert len(cluster.said) == 2
    assert "does not answer" in cluster.said[0]
    assert "answers again" in cluster.said[1]


def test_an_expired_token_is_read_again(server, cluster):
    server.script[:] = [error(401, "Unauthorized"), OK]
    write_token(cluster.path_of_config, server, "second")
    cluster.get("Job", "x")
    assert [token for _, _, token in server.seen] == ["Bearer first", "Bearer second"]


def test_messages_do_not_contain_tokens(server, cluster):
    server.script[:] = [error(403, "Forbidden", "violates PodSecurity")]
    with pytest.raises(ApiError) as caught:
        cluster.get("Job", "x")
    assert "first" not in str(caught.value) + "".join(cluster.said)
    assert caught.value.status == 403


def test_an_api_server_that_does_not_know_its_roles_yet_is_retried(server, cluster):
    server.script[:] = [
        error(403, "Forbidden", 'jobs.batch is forbidden: User "x" cannot create resource "jobs"'),
        OK,
    ]
    assert cluster.create({"kind": "Job", "metadata": {"name": "x"}}) == OK[2]


def test_a_refusal_by_admission_is_not_retried(server, cluster):
    server.script[:] = [error(403, "Forbidden", "exceeded quota: few"), OK]
    with pytest.raises(ApiError, match="exceeded quota"):
        cluster.create({"kind": "Job", "metadata": {"name": "x"}})


def test_a_permanent_error_is_not_retried(server, cluster):
    server.script[:] = [error(422, "Invalid", "spec.x: no")]
    with pytest.raises(ApiError, match=r"spec\.x"):
        cluster.create({"kind": "Job", "metadata": {"name": "x"}})
    assert len(server.seen) == 1


def test_deleting_an_object_that_is_gone_or_replaced_is_no_error(server, cluster):
    server.script[:] = [error(404), error(409)]
    for _ in range(2):
        cluster.delete({"kind": "Job", "metadata": {"name": "x", "uid": "u"}})
    assert [verb for verb, _, _ in server.seen] == ["DELETE", "DELETE"]


def test_a_single_try_does_not_wait(server, cluster):
    server.script[:] = ["drop"]
    with pytest.raises(Unreachable):
        cluster.once("GET", "/x")


def listed(version, *uids):
    items = [{"metadata": {"uid": uid, "labels": {"k": "a"}, "resourceVersion": version}} for uid in uids]
    return (200, {}, {"metadata": {"resourceVersion": version}, "items": items})


def changes(*events):
    return (200, {}, b"".join(json.dumps(event).encode() + b"\n" for event in events))


def change(kind, uid, version):
    return {
        "type": kind,
        "object": {"metadata": {"uid": uid, "labels": {"k": "a"}, "resourceVersion": version}},
    }


def test_a_mirror_lists_again_when_its_version_is_too_old(server, cluster):
    expired = {"code": 410, "reason": "Expired", "message": "too old resource version"}
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}
    server.script[:] = [
        listed("1", "one", "two"),
        changes(change("ADDED", "three", "2"), change("DELETED", "two", "3"), bookmark),
        changes({"type": "ERROR", "object": expired}),
        listed("20", "three"),
        *["drop"] * 50,
    ]
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    mirror.start()
    until = time.monotonic() + 10
    while len(server.seen) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    watched = [path for _, path, _ in server.seen if "watch=true" in path]
    assert "resourceVersion=1&" in watched[0]
    assert "resourceVersion=9&" in watched[1], "a bookmark advances the version"
    state = {obj["metadata"]["uid"]: mirror.is_gone(obj) for obj in mirror.of("a")}
    assert state == {"one": True, "two": True, "three": False}


def test_a_watch_that_breaks_resumes_from_its_version_without_a_list(server, cluster):
    server.script[:] = [
        listed("1", "one"),
        changes(change("ADDED", "two", "2")),
        "drop",
        "drop",
        changes(change("DELETED", "one", "3")),
        *["drop"] * 50,
    ]
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    mirror.start()
    until = time.monotonic() + 10
    while len(server.seen) < 6 and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    versions = [path.split("resourceVersion=")[1].split("&")[0] for _, path, _ in server.seen[1:5]]
    assert versions == ["1", "2", "2", "2"]
    state = {obj["metadata"]["uid"]: mirror.is_gone(obj) for obj in mirror.of("a")}
    assert state == {"one": True, "two": False}
    assert len([text for text in cluster.said if "answers again" in text]) == 1


def test_a_mirror_ignores_later_changes_of_forgotten_objects(server, cluster):
    """A gang is forgotten before it is deleted; a new gang may have its name by then."""
    server.script[:] = [listed("1", "one"), *["drop"] * 50]
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    mirror.start()
    assert mirror.synced.wait(10)
    mirror.forget("a")
    last = [change("MODIFIED", "one", "2"), change("ADDED", "two", "3"), change("DELETED", "one", "4")]
    server.script[:] = [changes(*last), *["drop"] * 50]
    until = time.monotonic() + 10
    while "resourceVersion=4" not in server.seen[-1][1] and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    assert [obj["metadata"]["uid"] for obj in mirror.all()] == ["two"]


def first_changes(cluster):
    """Return the uids of the changes that a mirror reports, until there is one."""
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    uids = []
    mirror.on_change = lambda obj: uids.append(obj["metadata"]["uid"])
    mirror.start()
    until = time.monotonic() + 10
    while not uids and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    return uids


@pytest.mark.parametrize("answer", [b"<html>please log in</html>", b"[]", b'{"error": "log in"}'])
def test_a_response_that_is_not_an_api_servers_counts_as_none(server, cluster, answer):
    """For example from a proxy. If it ended a mirror's thread, nobody would notice."""
    server.script[:] = [
        (200, {}, answer),
        listed("1", "one"),
        (200, {}, answer),
        changes(change("ADDED", "two", "2")),
        *["drop"] * 50,
    ]
    assert first_changes(cluster) == ["two"]
    assert "is there a proxy in between?" in cluster.said[0]


def test_a_bug_that_ends_a_mirror_is_reported(server, cluster):
    """Otherwise Snakemake would wait forever, because it would see nothing of its gangs."""
    server.script[:] = [listed("1", "one"), changes(change("ADDED", "two", "2")), *["drop"] * 50]
    errors = []
    mirror = Mirror(cluster, "Pod", "", "k", errors.append)
    mirror.on_change = lambda obj: 1 / 0
    mirror.start()
    mirror.join(10)
    assert [type(error) for error in errors] == [ZeroDivisionError]


@pytest.mark.parametrize("requests", [0, 1])
def test_credentials_that_cannot_be_read_for_a_moment_do_not_end_a_mirror(server, cluster, requests):
    """For example while a token's file is replaced: before the list, or before the watch."""
    server.script[:] = [listed("1", "one"), changes(change("ADDED", "two", "2")), *["drop"] * 50]
    faults = [1, 1]

    def refresh(_):
        if cluster.requests >= requests and faults:
            faults.pop()
            raise ConfigException("Token file exists but empty.")

    cluster._api.configuration.refresh_api_key_hook = refresh
    assert first_changes(cluster) == ["two"]
    assert "the credentials cannot be read: Token file exists but empty." in cluster.said[0]


def test_credentials_that_cannot_be_read_make_a_log_unreachable(cluster):
    def refresh(_):
        raise ConfigException("no token")

    cluster._api.configuration.refresh_api_key_hook = refresh
    with pytest.raises(Unreachable, match="no token"):
        cluster.log("x", "main")


def test_gc_reports_what_it_may_not_list_and_continues(server, cluster, capsys):
    forbidden = error(403, "Forbidden", 'jobs.batch is forbidden: User "x" cannot list resource "jobs"')
    service = {"metadata": {"name": "left", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}}
    page = (200, {}, {"metadata": {"resourceVersion": "1"}, "items": [service]})
    server.script[:] = [forbidden, error(404), error(404), error(404), page, page, error(404)]
    begun = time.monotonic()
    orphans = gc.orphans(cluster, 1.0)
    assert [(obj["kind"], reason) for obj, reason in orphans] == [("Service", "belongs to no gang")]
    assert "Jobs are skipped because they may not be listed" in capsys.readouterr().err
    assert time.monotonic() - begun < 5, "a missing permission is not waited for"


def ended_job(name, created, **fields):
    return {
        "kind": "Job",
        "metadata": {"name": name, "uid": name, "creationTimestamp": created},
        "status": fields,
    }


def stamp(hours):
    """A timestamp of the API, some hours ago."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600 * hours))


def test_gc_counts_from_a_gangs_end(cluster, monkeypatch):
    """A gang that ran for longer than --hours is not deleted at its end: nobody may have seen it yet."""

    def ended(kind, hours, **more):
        return {"conditions": [{"type": kind, "status": "True", "lastTransitionTime": stamp(hours)}], **more}

    jobs = [
        ended_job("runs", stamp(60)),
        ended_job("fresh-failed", stamp(60), **ended("Failed", 0.1)),
        ended_job("fresh", stamp(60), **ended("Complete", 0.1, completionTime=stamp(0.1))),
        ended_job("old-failed", stamp(60), **ended("Failed", 30)),
        ended_job("old", stamp(60), **ended("Complete", 30, completionTime=stamp(30))),
        ended_job("unknown", stamp(60), conditions=[{"type": "Failed", "status": "True"}]),
    ]
    monkeypatch.setattr(gc, "_listed", lambda _, kind: jobs if kind == "Job" else [])
    names = [obj["metadata"]["name"] for obj, _ in gc.orphans(cluster, 24.0)]
    assert names == ["old-failed", "old", "unknown"]


@pytest.fixture
def run_gc(cluster, monkeypatch):
    """`gc` with one gang to remove; returns a function that runs it."""
    job = ended_job("left", stamp(60), conditions=[{"type": "Failed", "status": "True"}])
    monkeypatch.setattr(gc, "_listed", lambda _, kind: [job] if kind == "Job" else [])
    monkeypatch.setattr(gc, "Cluster", lambda *_: cluster)

    def run(*options):
        monkeypatch.setattr("sys.argv", ["gc", "gc", *options])
        gc.main()

    return run


@pytest.mark.parametrize("stdin", [None, io.StringIO("")])
def test_gc_deletes_nothing_if_nobody_can_answer(server, run_gc, monkeypatch, capsys, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    run_gc()
    assert "nothing deleted: answer y, or pass --yes" in capsys.readouterr().out
    assert not server.seen


def test_gc_reports_what_it_may_not_delete(server, run_gc):
    server.script[:] = [error(403, "Forbidden", 'jobs.batch "left" is forbidden: User "x" cannot delete')]
    with pytest.raises(SystemExit, match=r"1 of 1 could not be deleted:\nJob left: .*cannot delete"):
        run_gc("--yes")
    assert len(server.seen) == 1, "a missing permission is not waited for"
