"""The API server, etcd, a container runtime and a node go away: no job is lost, none fails that should not."""

from __future__ import annotations

import base64
import json
import time
import urllib.request

import pytest
from test_life import counting, runs, steps

import harness
from harness import wait_until


@pytest.fixture(scope="module")
def outage():
    """Three gangs: etcd, a container runtime and a pod go away, then the API server for a minute."""
    harness.needs_nodes("an outage of etcd, of a container runtime, of the API server")
    long = harness.Workdir("outage-long", counting(150, nodes=2))
    short = harness.Workdir("outage-short", counting(100))
    deleted = harness.Workdir("outage-deleted", counting(12, nodes=2, retries=1))
    places = [long, short, deleted]
    processes = [place.start() for place in places]
    wait_until("all run", lambda: steps(long) and steps(short) and steps(deleted) >= 3, 120)
    victim = deleted.objects("pods")[1]["metadata"]["name"]
    harness.kubectl("delete", "pod", victim, "-n", harness.NAMESPACE, "--wait=false")
    wait_until("the second attempt", lambda: runs(deleted) == 2)
    # Requests fail after half a minute without etcd; a stream of a log begins anew after five seconds.
    for component, seconds in (("etcd", 40), ("containerd0", 12), ("containerd1", 12)):
        harness.cluster("stop", component)
        time.sleep(seconds)
        harness.cluster("start", component)
    harness.cluster("stop", "apiserver")
    time.sleep(60)
    ended_meanwhile = (short.path / "out/done.txt").exists()
    before = [process.poll() for process in processes[:2]]
    harness.cluster("start", "apiserver")
    # The cluster's own controllers take a minute and more to find back.
    codes = [process.wait(180) for process in processes]
    return {
        "ended": ended_meanwhile,
        "before": before,
        "codes": codes,
        "long": long,
        "short": short,
        "deleted": deleted,
    }


def test_the_controller_waits_for_the_api(outage):
    assert outage["before"] == [None, None], "both controllers outlived a minute without an API server"
    assert outage["codes"] == [0, 0, 0], outage["long"].said() + outage["short"].said()
    assert "the API server does not answer" in outage["long"].said()
    assert "the API server answers again" in outage["long"].said()


def test_gangs_ran_on_once(outage):
    assert outage["ended"], "one gang ended while nobody could see it"
    assert runs(outage["long"]) == runs(outage["short"]) == 1


def test_a_log_is_whole_over_reconnects(outage):
    lines = [line for line in outage["long"].said().splitlines() if "] step" in line]
    assert [line.split()[-1] for line in lines] == [str(n) for n in range(1, 151)]


def test_a_deleted_pod_restarts_its_gang_from_the_checkpoint(outage):
    said = outage["deleted"].said()
    assert "was deleted while it ran" in said
    assert runs(outage["deleted"]) == 2
    assert said.count(" step 2\n") == 1, "the second attempt began after the checkpoint"


def test_a_watch_whose_version_etcd_has_compacted_loses_no_job(workdir):
    """410 Gone: the API server comes back without the history that the watches would go on from."""
    harness.needs_nodes("a compaction of etcd")
    place = workdir(counting(30))
    process = place.start()
    wait_until("it runs", lambda: steps(place) >= 3, 120)
    version = place.objects("pods")[0]["metadata"]["resourceVersion"]
    harness.cluster("stop", "apiserver")
    compact_etcd()
    before = lists_of_pods()
    wait_until("it ends", lambda: (place.path / "out/done.txt").exists())
    harness.cluster("start", "apiserver")
    assert process.wait(180) == 0, place.said()
    assert runs(place) == 1
    query = f"watch=true&resourceVersion={version}&timeoutSeconds=1"
    path = f"/api/v1/namespaces/{harness.NAMESPACE}/pods?{query}"
    assert '"code":410' in harness.kubectl("get", "--raw", path), "the version that was watched is gone"
    assert lists_of_pods() > before, "the controller has listed anew"


def compact_etcd() -> None:
    """Drop etcd's history up to now, through its own API."""
    found = etcd("kv/range", key=base64.b64encode(b"x").decode())
    etcd("kv/compaction", revision=found["header"]["revision"], physical=True)


def etcd(path: str, **body) -> dict:
    port = 3379  # of the cluster in K8S_TEST_CLUSTER
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v3/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def lists_of_pods() -> int:
    """How often controllers have listed all their pods; one that looks for a gang's names it."""
    events = map(json.loads, harness.audit_log().read_text().splitlines())
    uris = [event["requestURI"] for event in events if event["verb"] == "list"]
    return sum("/pods?limit=500&labelSelector=" in uri and "%2C" not in uri for uri in uris)


def test_a_lost_node_restarts_the_gang_on_the_other(workdir):
    """Its pods run on, beyond the cluster's reach: they are stopped through the volume."""
    harness.needs_nodes("a lost node")
    place = workdir(counting(110, nodes=2, retries=1))
    process = place.start()
    wait_until("it has a checkpoint", lambda: steps(place) >= 3, 120)
    node = next(p for p in place.objects("pods") if "-0-" in p["metadata"]["name"])["spec"]["nodeName"]
    kubelet = f"kubelet{node.removeprefix('node')}"
    harness.cluster("stop", kubelet)
    try:
        wait_until("the second attempt", lambda: runs(place) == 2, 150)
        first = steps(place)
        others = [p for p in place.objects("pods") if p["spec"].get("nodeName") not in (node, None)]
        assert {p["metadata"]["name"].split("-")[2] for p in others} == {"0", "1"}, (
            "both ranks on the other node"
        )
        time.sleep(6)
        assert first + 4 <= steps(place) <= first + 8, "one writer, not two"
        assert "no longer responds" in place.said()
        assert process.wait(180) == 0, place.said()
        assert steps(place) == 110
        assert runs(place) == 2
        assert place.said().count(" step 3\n") == 1, "the second attempt began after the checkpoint"
    finally:
        harness.cluster("start", kubelet)
        harness.kill(process)
