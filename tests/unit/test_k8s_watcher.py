"""What is done about a gang at each look, against a cluster that is made of values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import snakemake_executor_plugin_kubernetes_gang as plugin
from snakemake_executor_plugin_kubernetes_gang import manifest, status, waits, watcher
from snakemake_executor_plugin_kubernetes_gang.spec import GangSpec

GANG = {"kind": "Job", "metadata": {"name": "one-0123456789", "uid": "0123456789", "creationTimestamp": "2026-01-01T00:00:00Z"}}  # fmt: skip


def pod(rank=0, phase="Running", **metadata):
    labels = {status.INDEX_LABEL: str(rank), manifest.LABEL_GANG: "one-0123456789"}
    state = {"running": {}} if phase == "Running" else {"waiting": {"reason": "ContainerCreating"}}
    return {
        "metadata": {"name": f"one-{rank}", "uid": f"pod-{rank}", "labels": labels, "creationTimestamp": "2026-01-01T00:00:01Z", **metadata},
        "spec": {"containers": [{"name": "main", "image": "x"}]},
        "status": {"phase": phase, "containerStatuses": [{"name": "main", "state": state}]},
    }  # fmt: skip


class Gangs:
    """One gang, whose object, pods and warnings a test sets."""

    def __init__(self):
        self.cluster, self.pods = SimpleNamespace(is_down=False), SimpleNamespace(is_gone=lambda pod: True)
        self.gang, self.there, self.done = GANG, [], []

    def read(self, gang, nodes, without=()):
        pods = [p for p in self.there if p["metadata"]["uid"] not in without]
        return self.gang, status.read(self.gang, pods, nodes)

    def pods_of(self, gang):
        return self.there

    def is_gone(self, gang):
        return False

    def end(self, gang):
        self.done.append("end")


class Logs:
    """Notes what is asked of the logs."""

    def __init__(self, done):
        self.done, self.waited, self.is_stored = done, [], True

    def stream(self, pod):
        return True

    def keep(self, pods):
        self.done.append(f"keep {[status.rank(p) for p in pods]}")

    def collect(self, pods, wait_s):
        self.done.append("collect")
        self.waited.append(wait_s)
        return self.is_stored

    def tails(self, pods):
        return {}

    def cut(self, pods):
        return []

    def files(self):
        return []

    def whole(self, pod):
        return b""


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """A watcher of one gang of two, a clock that the test moves, and what was said and done."""
    gangs, said, clock = Gangs(), [], SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watcher.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(watcher, "RankLogs", lambda *_: Logs(gangs.done))
    site = SimpleNamespace(settings=SimpleNamespace(start_timeout=600))
    made = watcher.Watcher(gangs, site, said.append, lambda name, line: None)
    made._news = SimpleNamespace(
        warnings=lambda *_: [], workloads=lambda uid: [], refresh=lambda: gangs.done.append("refresh")
    )
    spec = GangSpec(name="one-0123456789", command="true", workdir="/w", project="/w/S", image="i", uid=1, gid=1,
                    state_dir=str(tmp_path), token="t", nodes=2)  # fmt: skip
    watch = made.begin(SimpleNamespace(attempt=1, restart_times=0), spec, GANG)
    watch.begun = clock.now
    return SimpleNamespace(watcher=made, watch=watch, gangs=gangs, said=said, clock=clock)


def look(seen, after_s=1.0):
    seen.clock.now += after_s
    return seen.watcher.look(seen.watch)


def image_fails(rank):
    found = pod(rank, "Pending")
    found["status"]["containerStatuses"][0]["state"] = {
        "waiting": {"reason": "ErrImagePull", "message": "no"}
    }
    return found


def test_a_cause_that_passes_is_counted_anew_when_it_comes_again(seen):
    seen.gangs.there = [image_fails(0)]
    look(seen, 10)
    seen.gangs.there = [pod(0, "Pending")]
    look(seen, 250)
    seen.gangs.there = [image_fails(0)]
    for _ in range(4):
        look(seen, 60)
    assert not seen.watch.ending, "it has lasted for 180 s, not for 500"
    look(seen, 200)
    assert seen.watch.ending.reason == "image"


def test_before_a_gang_is_stopped_its_logs_are_kept(seen):
    seen.gangs.there = [pod(0), image_fails(1)]
    look(seen, 10)
    look(seen, 400)
    assert seen.gangs.done == ["keep [0, 1]"]
    verdict = look(seen, 1)
    assert seen.gangs.done == ["keep [0, 1]", "end", "collect"]
    assert "cannot get its image" in verdict.sentence


def test_when_a_rank_fails_the_others_logs_are_kept_at_once(seen):
    """Not at the next look: the Job deletes their pods a second later."""
    seen.gangs.there = [pod(0), pod(1, "Failed")]
    seen.watcher._pod_changed(pod(0))
    assert seen.gangs.done == []
    seen.watcher._pod_changed(pod(1, "Failed"))
    assert seen.gangs.done == ["keep [0, 1]"]


def test_a_gang_that_a_queue_takes_back_is_waited_for(seen):
    seen.gangs.there = [pod(0), pod(1)]
    look(seen, 10)
    seen.gangs.gang = {**GANG, "spec": {"suspend": True}}
    seen.gangs.there = [pod(0, deletionTimestamp="t"), pod(1, deletionTimestamp="t")]
    look(seen, 10)
    look(seen, 100)
    seen.gangs.gang = GANG  # it may go on, but its pods are not there yet
    look(seen, 1)
    look(seen, 100)
    assert not seen.watch.ending
    assert "refresh" in seen.gangs.done, "why it was taken back is asked anew"
    assert any("it is suspended, as by a queue" in text for text in seen.said)


def test_gangs_that_started_half_do_not_give_up_in_step(seen):
    limits = {seen.watcher.begin(SimpleNamespace(), seen.watch.spec, GANG).half_limit_s for _ in range(20)}
    assert len(limits) == 20
    assert all(600 <= limit <= 750 for limit in limits)


def test_a_node_that_gives_no_log_holds_up_no_other_gang(seen):
    seen.gangs.gang = {**GANG, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    logs = seen.watch.logs
    logs.is_stored = False
    for after_s in (1, 1, 1, 20):
        assert look(seen, after_s) is None
    assert logs.waited == [0.5, 0.0, 0.0, 0.5]
    logs.is_stored = True
    assert look(seen).success


def test_a_failure_says_whether_it_is_tried_again():
    fault, accident = waits.Cause("oom", "x"), waits.Cause("drained", "x", transient=True)
    assert watcher.again(1, 3, fault) == "It is tried again (attempt 2 of 3)."
    assert watcher.again(3, 3, fault) == "It is not tried again (attempt 3 of 3)."
    assert watcher.again(1, 1, accident).endswith("Start Snakemake again, or raise retries.")


def test_a_running_group_of_jobs_is_taken_up_again():
    """A group has no rule; that it was asked for one ended the whole workflow."""
    group = SimpleNamespace(is_group=lambda: True, output=[])
    spec = SimpleNamespace(annotations={manifest.FINGERPRINT: "mark"}, nodes=1)
    left = {"kind": "Job", "metadata": {"annotations": {manifest.FINGERPRINT: "mark"}}}
    assert plugin.Executor._why_not(None, left, group, spec) == ""
