"""What the watcher does at each poll, with a fake cluster."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

import snakemake_executor_plugin_kubernetes_gang as plugin
from snakemake_executor_plugin_kubernetes_gang import status, waits, watcher
from snakemake_executor_plugin_kubernetes_gang.objects import FINGERPRINT, INDEX_LABEL, LABEL_GANG

NAME = "one-0123456789"
GANG = {
    "kind": "Job",
    "metadata": {"name": NAME, "uid": "0123456789", "creationTimestamp": "2026-01-01T00:00:00Z"},
}


def pod(rank=0, phase="Running", **metadata):
    labels = {INDEX_LABEL: str(rank), LABEL_GANG: NAME}
    created = {"creationTimestamp": "2026-01-01T00:00:01Z"}
    state = {"running": {}} if phase == "Running" else {"waiting": {"reason": "ContainerCreating"}}
    return {
        "metadata": {"name": f"one-{rank}", "uid": f"pod-{rank}", "labels": labels, **created, **metadata},
        "spec": {"containers": [{"name": "main", "image": "x"}]},
        "status": {"phase": phase, "containerStatuses": [{"name": "main", "state": state}]},
    }


class Gangs:
    """One gang, whose object, pods and warnings a test sets."""

    def __init__(self):
        self.cluster, self.pods = SimpleNamespace(is_down=False), SimpleNamespace(is_gone=lambda pod: True)
        self.gang, self.present, self.done = GANG, [], []

    def read(self, gang, nodes, without=()):
        pods = [p for p in self.present if p["metadata"]["uid"] not in without]
        return self.gang, status.read(self.gang, pods, nodes)

    def pods_of(self, gang):
        return self.present

    def is_gone(self, gang):
        return False

    def end(self, gang):
        self.done.append("end")


class Logs:
    """Records the calls."""

    def __init__(self, done):
        self.done, self.waited, self.is_stored = done, [], True

    def stream(self, pod):
        return True

    def save(self, pods):
        self.done.append(f"save {[status.rank(p) for p in pods]}")

    def collect(self, pods, wait_s):
        self.done.append("collect")
        self.waited.append(wait_s)
        return self.is_stored

    def tails(self, pods):
        return {}

    def incomplete(self, pods):
        return []

    def files(self):
        return []

    def read(self, pod):
        return b""


@pytest.fixture
def watched(monkeypatch, spec):
    """A watcher of one gang of two pods, a clock that the test moves, and what was said and done."""
    gangs, said, clock = Gangs(), [], SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watcher.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(watcher, "RankLogs", lambda *_: Logs(gangs.done))
    site = SimpleNamespace(settings=SimpleNamespace(start_timeout=600))
    ours = watcher.Watcher(gangs, site, said.append, lambda name, line: None)
    ours._evidence = SimpleNamespace(
        warnings=lambda *_: [], workloads=lambda uid: [], refresh=lambda: gangs.done.append("refresh")
    )
    watch = ours.begin(SimpleNamespace(attempt=1, restart_times=0), replace(spec, nodes=2), GANG)
    watch.begin = clock.now
    return SimpleNamespace(watcher=ours, watch=watch, gangs=gangs, said=said, clock=clock)


def poll(watched, after_s=1.0):
    watched.clock.now += after_s
    return watched.watcher.poll(watched.watch)


def image_fails(rank):
    failing = pod(rank, "Pending")
    failing["status"]["containerStatuses"][0]["state"] = {
        "waiting": {"reason": "ErrImagePull", "message": "no"}
    }
    return failing


def test_the_time_of_a_cause_restarts_when_it_returns(watched):
    watched.gangs.present = [image_fails(0)]
    poll(watched, 10)
    watched.gangs.present = [pod(0, "Pending")]
    poll(watched, 250)
    watched.gangs.present = [image_fails(0)]
    for _ in range(4):
        poll(watched, 60)
    assert not watched.watch.stop_cause, "it has lasted for 180 s, not for 500"
    poll(watched, 200)
    assert watched.watch.stop_cause.reason == "image"


def test_logs_are_saved_before_a_gang_is_stopped(watched):
    watched.gangs.present = [pod(0), image_fails(1)]
    poll(watched, 10)
    poll(watched, 400)
    assert watched.gangs.done == ["save [0, 1]"]
    verdict = poll(watched, 1)
    assert watched.gangs.done == ["save [0, 1]", "end", "collect"]
    assert "cannot get its image" in verdict.sentence


def test_when_a_rank_fails_the_logs_of_the_others_are_saved_at_once(watched):
    """Not at the next poll: the Job deletes their pods a second later."""
    watched.gangs.present = [pod(0), pod(1, "Failed")]
    watched.watcher._pod_changed(pod(0))
    assert watched.gangs.done == []
    watched.watcher._pod_changed(pod(1, "Failed"))
    assert watched.gangs.done == ["save [0, 1]"]


def test_a_requeued_gang_is_waited_for(watched):
    watched.gangs.present = [pod(0), pod(1)]
    poll(watched, 10)
    watched.gangs.gang = {**GANG, "spec": {"suspend": True}}
    watched.gangs.present = [pod(0, deletionTimestamp="t"), pod(1, deletionTimestamp="t")]
    poll(watched, 10)
    poll(watched, 100)
    watched.gangs.gang = GANG  # admitted again, but it has no pods yet
    poll(watched, 1)
    poll(watched, 100)
    assert not watched.watch.stop_cause
    assert "refresh" in watched.gangs.done, "the reason is read again"
    assert any("it is suspended, probably by a queue" in text for text in watched.said)


def test_partially_started_gangs_do_not_give_up_in_step(watched):
    limits = {
        watched.watcher.begin(SimpleNamespace(), watched.watch.spec, GANG).partial_limit_s for _ in range(20)
    }
    assert len(limits) == 20
    assert all(600 <= limit <= 750 for limit in limits)


def test_a_node_without_logs_does_not_delay_other_gangs(watched):
    watched.gangs.gang = {**GANG, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    logs = watched.watch.logs
    logs.is_stored = False
    for after_s in (1, 1, 1, 20):
        assert poll(watched, after_s) is None
    assert logs.waited == [0.5, 0.0, 0.0, 0.5]
    logs.is_stored = True
    assert poll(watched).success


def test_a_failure_reports_whether_it_is_tried_again():
    fault, accident = waits.Cause("oom", "x"), waits.Cause("drained", "x", transient=True)
    assert watcher.retry_sentence(1, 3, fault) == "It is tried again (attempt 2 of 3)."
    assert watcher.retry_sentence(3, 3, fault) == "It is not tried again (attempt 3 of 3)."
    assert watcher.retry_sentence(1, 1, accident).endswith("Start Snakemake again, or raise retries.")


def test_a_running_group_of_jobs_is_reattached():
    """A group has no rule, and with it no shadow directory."""
    group = SimpleNamespace(is_group=lambda: True, output=[])
    spec = SimpleNamespace(annotations={FINGERPRINT: "mark"}, nodes=1)
    gang = {"kind": "Job", "metadata": {"annotations": {FINGERPRINT: "mark"}}}
    assert plugin.Executor._reason_to_replace(None, gang, group, spec) == ""
