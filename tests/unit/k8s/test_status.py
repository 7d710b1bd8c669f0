from __future__ import annotations

import pytest

from snakemake_executor_plugin_kubernetes_gang import status
from snakemake_executor_plugin_kubernetes_gang.objects import INDEX_LABEL


def gang(kind, *conditions, **fields):
    entries = [{"type": t, "status": "True", "reason": "R", "message": "M"} for t in conditions]
    return {"kind": kind, "metadata": {"name": "x"}, "status": {"conditions": entries, **fields}}


def pod(rank, phase="Running", created="1", **metadata):
    labels = {INDEX_LABEL: str(rank)}
    return {
        "metadata": {"name": f"x-{rank}", "labels": labels, "creationTimestamp": created, **metadata},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("obj", "phase"),
    [
        (gang("Job", "Complete", "SuccessCriteriaMet"), "succeeded"),
        (gang("Job", "Failed"), "failed"),
        (gang("Job", "FailureTarget"), "pending"),
        (gang("Job", "Suspended"), "queued"),
        (gang("JobSet", "Completed"), "succeeded"),
        (gang("JobSet", "Failed"), "failed"),
        (gang("TrainJob", "Complete"), "succeeded"),
        (gang("TrainJob", "Failed"), "failed"),
        (gang("DeepSpeedJob", "Completed", phase="Succeeded"), "succeeded"),
        (gang("DeepSpeedJob", "Completed", "Failed", phase="Failed"), "failed"),
        (gang("DeepSpeedJob", "Failed"), "failed"),
        (gang("DeepSpeedJob", "Initialized", phase="Pending"), "pending"),
        (gang("DeepSpeedJob", "Paused", phase="Paused"), "pending"),
        ({"kind": "Job", "metadata": {}}, "pending"),
    ],
)
def test_phases(obj, phase):
    assert status.read(obj, [], 2).phase == phase


def test_a_gang_runs_when_all_its_pods_do():
    obj = gang("Job")
    assert status.read(obj, [pod(0), pod(1, "Pending")], 2).phase == "starting"
    assert status.read(obj, [pod(0), pod(1)], 2).phase == "running"
    assert status.read(obj, [pod(0), pod(1, "Succeeded")], 2).phase == "running"
    assert status.read(obj, [pod(0), pod(1, deletionTimestamp="t")], 2).phase == "starting"


def with_agent(rank, code=None, agent="running"):
    """A pod whose command ended with a code, or runs, and whose agent runs on or has ended."""
    ended = {"terminated": {"exitCode": code}} if code is not None else {"running": {}}
    states = [{"name": "agent", "state": {agent: {}}}, {"name": "main", "state": ended}]
    found = pod(rank)
    found["status"]["containerStatuses"] = states
    return found


@pytest.mark.parametrize(
    ("pods", "phase"),
    [
        ([with_agent(0, 0), with_agent(1, 0)], "succeeded"),
        ([with_agent(0, 0), with_agent(1, 0, agent="terminated")], "succeeded"),
        ([with_agent(0, 0), with_agent(1)], "running"),
        ([with_agent(0, 0)], "starting"),
        ([with_agent(0, 3), with_agent(1)], "failed"),
        ([with_agent(0, 3, agent="terminated"), with_agent(1)], "running"),  # the cluster ends it
    ],
)
def test_a_container_that_stays_does_not_keep_a_gang_whose_commands_have_ended(pods, phase):
    assert status.read(gang("Job"), pods, 2).phase == phase


def test_a_requeued_gang_is_queued_although_its_pods_still_end():
    obj = {**gang("Job"), "spec": {"suspend": True}}
    assert status.read(obj, [pod(0, deletionTimestamp="t"), pod(1)], 2).phase == "queued"


def test_the_newest_pod_of_a_rank_counts():
    pods = [
        pod(0, "Failed", created="2026-01-01T00:00:00Z"),
        pod(0, "Running", created="2026-01-01T00:01:00Z"),
    ]
    assert [p["status"]["phase"] for p in status.newest_by_rank(pods)] == ["Running"]


def test_the_rank_of_a_deepspeedjobs_pod_is_in_its_name():
    assert status.rank({"metadata": {"name": "sft-0123-worker-12"}}) == 12


def test_a_deepspeedjob_has_failed_if_any_worker_has_although_the_first_succeeded():
    obj = gang("DeepSpeedJob", "Completed", phase="Succeeded")
    beside = {"Failed": "failed", "Running": "succeeded", "Succeeded": "succeeded"}
    assert {p: status.read(obj, [pod(0, "Succeeded"), pod(1, p)], 2).phase for p in beside} == beside
    deleted = pod(1, "Failed", deletionTimestamp="t")  # a worker that waited is ended with the job
    assert status.read(obj, [pod(0, "Succeeded"), deleted], 2).phase == "succeeded"


def test_times():
    ends = [
        ("2026-01-01T00:00:10Z", "2026-01-01T00:01:00Z"),
        ("2026-01-01T00:00:05Z", "2026-01-01T00:00:55Z"),
    ]
    pods = [
        {"status": {"containerStatuses": [{"state": {"terminated": {"startedAt": a, "finishedAt": b}}}]}}
        for a, b in ends
    ]
    assert status.run_seconds(pods) == 55
    assert status.run_seconds([]) == 0
