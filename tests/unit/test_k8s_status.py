from __future__ import annotations

import pytest

from snakemake_executor_plugin_kubernetes_gang import status


def gang(kind, *conditions, **fields):
    entries = [{"type": t, "status": "True", "reason": "R", "message": "M"} for t in conditions]
    return {"kind": kind, "metadata": {"name": "x"}, "status": {"conditions": entries, **fields}}


def pod(rank, phase="Running", created="1", **metadata):
    labels = {status.INDEX_LABEL: str(rank)}
    return {
        "metadata": {"name": f"x-{rank}", "labels": labels, "creationTimestamp": created, **metadata},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("thing", "phase"),
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
def test_phases(thing, phase):
    assert status.read(thing, [], 2).phase == phase


def test_a_gang_runs_when_all_its_pods_do():
    thing = gang("Job")
    assert status.read(thing, [pod(0), pod(1, "Pending")], 2).phase == "starting"
    assert status.read(thing, [pod(0), pod(1)], 2).phase == "running"
    assert status.read(thing, [pod(0), pod(1, "Succeeded")], 2).phase == "running"
    assert status.read(thing, [pod(0), pod(1, deletionTimestamp="t")], 2).phase == "starting"


def test_a_gang_that_a_queue_takes_back_is_queued_though_its_pods_still_end():
    thing = {**gang("Job"), "spec": {"suspend": True}}
    assert status.read(thing, [pod(0, deletionTimestamp="t"), pod(1)], 2).phase == "queued"


def test_the_newest_pod_of_a_rank_counts():
    pods = [
        pod(0, "Failed", created="2026-01-01T00:00:00Z"),
        pod(0, "Running", created="2026-01-01T00:01:00Z"),
    ]
    assert [p["status"]["phase"] for p in status.newest_by_rank(pods)] == ["Running"]


def test_a_deepspeedjobs_rank_stands_in_its_name():
    assert status.rank({"metadata": {"name": "sft-0123-worker-12"}}) == 12


def test_a_deepspeedjob_whose_first_worker_ended_well_beside_a_failed_one_has_failed():
    thing = gang("DeepSpeedJob", "Completed", phase="Succeeded")
    beside = {"Failed": "failed", "Running": "succeeded", "Succeeded": "succeeded"}
    assert {p: status.read(thing, [pod(0, "Succeeded"), pod(1, p)], 2).phase for p in beside} == beside
    taken_away = pod(1, "Failed", deletionTimestamp="t")  # a worker that waited is ended with the job
    assert status.read(thing, [pod(0, "Succeeded"), taken_away], 2).phase == "succeeded"


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
