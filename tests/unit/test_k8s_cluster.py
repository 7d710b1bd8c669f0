"""The API client and the mirror against faults that a healthy server does not produce on demand."""

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
    """Gives the answers of `script`, one per request: (status, headers, body); "drop" closes the connection."""

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
    found = Server()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def cluster(server, tmp_path, monkeypatch):
    monkeypatch.setattr(api.random, "uniform", lambda low, high: 0.1)
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    write_token(path, server, "first")
    said = []
    made = Cluster(None, None, said.append)
    made.said, made.path_of_config = said, path
    return made


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


def test_a_full_server_is_asked_again_when_it_says(server, cluster):
    server.script[:] = [error(429, **{"Retry-After": "1"}), OK]
    begun = time.monotonic()
    assert cluster.get("Job", "x") == OK[2]
    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("fault", [error(500), error(503), error(504), "drop"])
def test_faults_that_pass_are_outlasted(server, cluster, fault):
    server.script[:] = [fault, fault, OK]
    assert cluster.get("Job", "x") == OK[2]


def test_an_absence_is_said_once_and_its_end(server, cluster):
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


def test_tokens_do_not_get_into_messages(server, cluster):
    server.script[:] = [error(403, "Forbidden", "violates PodSecurity")]
    with pytest.raises(ApiError) as caught:
        cluster.get("Job", "x")
    assert "first" not in str(caught.value) + "".join(cluster.said)
    assert caught.value.status == 403


def test_an_api_server_that_does_not_know_its_roles_yet_is_asked_again(server, cluster):
    server.script[:] = [
        error(403, "Forbidden", 'jobs.batch is forbidden: User "x" cannot create resource "jobs"'),
        OK,
    ]
    assert cluster.create({"kind": "Job", "metadata": {"name": "x"}}) == OK[2]


def test_what_admission_refuses_is_not_asked_again(server, cluster):
    server.script[:] = [error(403, "Forbidden", "exceeded quota: few"), OK]
    with pytest.raises(ApiError, match="exceeded quota"):
        cluster.create({"kind": "Job", "metadata": {"name": "x"}})


def test_what_waiting_does_not_change_is_not_waited_for(server, cluster):
    server.script[:] = [error(422, "Invalid", "spec.x: no")]
    with pytest.raises(ApiError, match=r"spec\.x"):
        cluster.create({"kind": "Job", "metadata": {"name": "x"}})
    assert len(server.seen) == 1


def test_deletion_names_the_very_object_and_gone_is_fine(server, cluster):
    server.script[:] = [error(404), error(409)]
    for _ in range(2):
        cluster.delete({"kind": "Job", "metadata": {"name": "x", "uid": "u"}})
    assert [verb for verb, _, _ in server.seen] == ["DELETE", "DELETE"]


def test_one_try_does_not_wait(server, cluster):
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


def test_a_mirror_lists_anew_when_its_version_is_too_old(server, cluster):
    gone = {
        "type": "ERROR",
        "object": {"code": 410, "reason": "Expired", "message": "too old resource version"},
    }
    server.script[:] = [
        listed("1", "one", "two"),
        changes(change("ADDED", "three", "2"), change("DELETED", "two", "3"), {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}),
        changes(gone),
        listed("20", "three"),
        *["drop"] * 50,
    ]  # fmt: skip
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    mirror.start()
    until = time.monotonic() + 10
    while len(server.seen) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    watched = [path for _, path, _ in server.seen if "watch=true" in path]
    assert "resourceVersion=1&" in watched[0]
    assert "resourceVersion=9&" in watched[1], "a bookmark moves the version on"
    state = {thing["metadata"]["uid"]: mirror.is_gone(thing) for thing in mirror.of("a")}
    assert state == {"one": True, "two": True, "three": False}


def test_a_watch_that_breaks_goes_on_from_its_version_without_a_list(server, cluster):
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
    state = {thing["metadata"]["uid"]: mirror.is_gone(thing) for thing in mirror.of("a")}
    assert state == {"one": True, "two": False}
    assert len([text for text in cluster.said if "answers again" in text]) == 1


def test_a_mirror_that_has_been_told_to_forget_does_not_take_the_deletion_for_news(server, cluster):
    """A gang is forgotten before it is deleted; a new one may have its name by then."""
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
    assert [thing["metadata"]["uid"] for thing in mirror.all()] == ["two"]


def first_heard(cluster):
    """Return the changes that a mirror has told of by the time that it tells of one."""
    mirror = Mirror(cluster, "Pod", "", "k", pytest.fail)
    heard = []
    mirror.changed = lambda thing: heard.append(thing["metadata"]["uid"])
    mirror.start()
    until = time.monotonic() + 10
    while not heard and time.monotonic() < until:
        time.sleep(0.05)
    mirror.stop()
    return heard


@pytest.mark.parametrize("answer", [b"<html>please log in</html>", b"[]", b'{"error": "log in"}'])
def test_an_answer_that_is_not_an_api_servers_counts_as_none(server, cluster, answer):
    """As from a proxy in between. A mirror's thread that died of it would never say so."""
    server.script[:] = [(200, {}, answer), listed("1", "one"), (200, {}, answer), changes(change("ADDED", "two", "2")), *["drop"] * 50]  # fmt: skip
    assert first_heard(cluster) == ["two"]
    assert "is there a proxy in between?" in cluster.said[0]


def test_an_error_of_ours_that_ends_a_mirror_is_told(server, cluster):
    """Nothing would be seen of the gangs any more, and Snakemake would wait for ever."""
    server.script[:] = [listed("1", "one"), changes(change("ADDED", "two", "2")), *["drop"] * 50]
    told = []
    mirror = Mirror(cluster, "Pod", "", "k", told.append)
    mirror.changed = lambda thing: 1 / 0
    mirror.start()
    mirror.join(10)
    assert [type(found) for found in told] == [ZeroDivisionError]


@pytest.mark.parametrize("requests", [0, 1])
def test_credentials_that_cannot_be_read_for_a_moment_end_no_mirror(server, cluster, requests):
    """As while a token's file is replaced; before the list, or before the watch."""
    server.script[:] = [listed("1", "one"), changes(change("ADDED", "two", "2")), *["drop"] * 50]
    faults = [1, 1]

    def refresh(_):
        if cluster.requests >= requests and faults:
            faults.pop()
            raise ConfigException("Token file exists but empty.")

    cluster._api.configuration.refresh_api_key_hook = refresh
    assert first_heard(cluster) == ["two"]
    assert "the credentials cannot be read: Token file exists but empty." in cluster.said[0]


def test_credentials_that_cannot_be_read_are_no_answer_to_a_log(cluster):
    def refresh(_):
        raise ConfigException("no token")

    cluster._api.configuration.refresh_api_key_hook = refresh
    with pytest.raises(Unreachable, match="no token"):
        cluster.log("x", "main")


def test_gc_says_what_it_may_not_list_and_goes_on(server, cluster, capsys):
    forbidden = error(403, "Forbidden", 'jobs.batch is forbidden: User "x" cannot list resource "jobs"')
    service = {"metadata": {"name": "left", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}}
    page = (200, {}, {"metadata": {"resourceVersion": "1"}, "items": [service]})
    server.script[:] = [forbidden, error(404), error(404), error(404), page, page, error(404)]
    begun = time.monotonic()
    found = gc.orphans(cluster, 1.0)
    assert [(thing["kind"], why) for thing, why in found] == [("Service", "belongs to no gang")]
    assert "Jobs are left out, for they may not be listed" in capsys.readouterr().err
    assert time.monotonic() - begun < 5, "a right that is missing is not waited for"


def ended_job(name, made, **fields):
    return {
        "kind": "Job",
        "metadata": {"name": name, "uid": name, "creationTimestamp": made},
        "status": fields,
    }


def stamp(hours):
    """A timestamp of the API, some hours ago."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600 * hours))


def test_gc_counts_from_a_gangs_end(cluster, monkeypatch):
    """One that ran for longer than --hours is not taken a minute after its end: nobody may have seen it yet."""

    def ended(kind, hours, **more):
        return {"conditions": [{"type": kind, "status": "True", "lastTransitionTime": stamp(hours)}], **more}

    there = [
        ended_job("runs", stamp(60)),
        ended_job("fresh-failed", stamp(60), **ended("Failed", 0.1)),
        ended_job("fresh", stamp(60), **ended("Complete", 0.1, completionTime=stamp(0.1))),
        ended_job("old-failed", stamp(60), **ended("Failed", 30)),
        ended_job("old", stamp(60), **ended("Complete", 30, completionTime=stamp(30))),
        ended_job("untold", stamp(60), conditions=[{"type": "Failed", "status": "True"}]),
    ]
    monkeypatch.setattr(gc, "_listed", lambda _, kind: there if kind == "Job" else [])
    found = [thing["metadata"]["name"] for thing, _ in gc.orphans(cluster, 24.0)]
    assert found == ["old-failed", "old", "untold"]


@pytest.fixture
def one_left(cluster, monkeypatch):
    """`gc` with one gang to remove; returns a function that runs it."""
    left = ended_job("left", stamp(60), conditions=[{"type": "Failed", "status": "True"}])
    monkeypatch.setattr(gc, "_listed", lambda _, kind: [left] if kind == "Job" else [])
    monkeypatch.setattr(gc, "Cluster", lambda *_: cluster)

    def run(*options):
        monkeypatch.setattr("sys.argv", ["gc", "gc", *options])
        gc.main()

    return run


@pytest.mark.parametrize("stdin", [None, io.StringIO("")])
def test_gc_deletes_nothing_where_nobody_can_be_asked(server, one_left, monkeypatch, capsys, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    one_left()
    assert "nothing deleted; answer y, or give --yes" in capsys.readouterr().out
    assert not server.seen


def test_gc_says_what_it_may_not_delete(server, one_left):
    server.script[:] = [error(403, "Forbidden", 'jobs.batch "left" is forbidden: User "x" cannot delete')]
    with pytest.raises(SystemExit, match=r"1 of 1 could not be deleted:\nJob left: .*cannot delete"):
        one_left("--yes")
    assert len(server.seen) == 1, "a right that is missing is not waited for"
