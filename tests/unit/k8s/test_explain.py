"""Causes, given objects as API servers return them; real faults and GPUs are not available here."""

from __future__ import annotations

import pytest

from snakemake_executor_plugin_kubernetes_gang import explain, status, waits
from snakemake_executor_plugin_kubernetes_gang.objects import INDEX_LABEL
from snakemake_executor_plugin_kubernetes_gang.waits import Case

JOB = {"kind": "Job", "metadata": {"name": "sft-1", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}}


def failed_job(reason="BackoffLimitExceeded", message="Job has reached the specified backoff limit"):
    return {
        **JOB,
        "status": {
            "conditions": [{"type": "Failed", "status": "True", "reason": reason, "message": message}]
        },
    }


def pod(rank=0, code=None, message="", finished="2026-01-01T00:01:00Z", ended="Error", **fields):
    """A pod as the kubelet leaves it; `code` is its container's exit code."""
    pod_status = {
        "phase": "Failed" if code else "Running",
        **{k: v for k, v in fields.items() if k != "deleted"},
    }
    if code is not None:
        end = {
            "exitCode": code,
            "reason": ended,
            "message": message,
            "startedAt": "2026-01-01T00:00:10Z",
            "finishedAt": finished,
        }
        pod_status["containerStatuses"] = [{"name": "main", "state": {"terminated": end}}]
    metadata = {
        "name": f"sft-1-{rank}-abcde",
        "labels": {INDEX_LABEL: str(rank)},
        "creationTimestamp": "2026-01-01T00:00:01Z",
        **({"deletionTimestamp": fields["deleted"]} if "deleted" in fields else {}),
    }
    spec = {"containers": [{"name": "main", "image": "x", "resources": {"limits": {"memory": "4G"}}}]}
    return {"metadata": metadata, "spec": spec, "status": pod_status}


def disrupted(reason, message=""):
    return pod(
        phase="Failed",
        conditions=[{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}],
    )


CASES = {
    "preempted": [
        disrupted(
            "PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"
        )
    ],
    "evicted": [disrupted("TerminationByKubelet", "The node was low on resource: memory.")],
    "drained": [disrupted("EvictionByEvictionAPI", "Eviction API: evicting")],
    "node-lost": [disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")],
    "admission": [
        pod(
            phase="Failed",
            reason="UnexpectedAdmissionError",
            message="Allocate failed due to no healthy devices present; cannot allocate unhealthy devices nvidia.com/gpu",
        )
    ],
    "deadline": [
        pod(
            phase="Failed",
            reason="DeadlineExceeded",
            message="Pod was active on the node longer than the specified deadline",
        )
    ],
    "oom": [pod(code=137, ended="OOMKilled")],
    "gpu-memory": [
        pod(code=1, message="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    ],
    "xid": [pod(code=1, message="RuntimeError: CUDA error: uncorrectable ECC error encountered")],
    "child-oom": [
        pod(
            code=1, message="  exitcode   : -9 (pid: 77)\n  traceback : Signal 9 (SIGKILL) received by PID 77"
        )
    ],
    "shm": [
        pod(
            code=1,
            message="ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
        )
    ],
    "timeout": [
        pod(
            code=1,
            message="[rank0]:[E ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
        )
    ],
    "nan": [pod(code=1, message="FloatingPointError: loss is nan at step 12")],
    "volume": [
        pod(code=97, message="kubernetes-gang: this pod does not see the controller's working directory")
    ],
    "no-address": [pod(code=99, message="kubernetes-gang: no address for sft-1-0.sft-1 after 600 s")],
    "superseded": [
        pod(code=98, message="kubernetes-gang: another gang of this name has been started; this pod ends")
    ],
    "exit-code": [pod(code=2, message="error: datasets: unknown dataset 'x'")],
    "peer": [
        pod(
            code=1,
            message="RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:1234",
        )
    ],
    "deleted": [pod(code=143, deleted="2026-01-01T00:00:50Z")],
    "unknown": [],
}


@pytest.mark.parametrize("reason", CASES)
def test_a_cause_is_named(reason):
    cause = explain.explain(Case(failed_job(), CASES[reason]))
    assert cause.reason == reason
    sentence = cause.sentence()
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert cause.advice, "it names a remedy"


def test_the_deadline_of_a_job():
    assert (
        explain.explain(
            Case(failed_job("DeadlineExceeded", "Job was active longer than specified deadline"))
        ).reason
        == "deadline"
    )


def test_a_killed_peer_is_the_cause_rather_than_those_that_lost_it():
    """Rank 1 is killed for its memory; rank 0 ends earlier by its node's clock, with a network error."""
    peer = pod(0, code=1, message="Connection reset by peer", finished="2026-01-01T00:00:30Z")
    killed = pod(1, code=137, ended="OOMKilled", finished="2026-01-01T00:00:31Z")
    assert explain.explain(Case(failed_job(), [peer, killed])).reason == "oom"


def test_a_rank_that_failed_by_itself_is_the_cause_rather_than_those_that_lost_it():
    peer = pod(0, code=1, message="Connection closed by peer", finished="2026-01-01T00:00:30Z")
    guilty = pod(1, code=1, message="Traceback\nKeyError: 'labels'\n", finished="2026-01-01T00:00:31Z")
    cause = explain.explain(Case(failed_job(), [peer, guilty]))
    assert cause.reason == "exit-code"
    assert "sft-1-1-" in cause.what
    assert cause.evidence == "KeyError: 'labels'"


def test_pods_that_were_terminated_after_a_failure_are_not_called_deleted():
    guilty = pod(1, code=5, message="x")
    ended = pod(0, code=143, deleted="2026-01-01T00:01:01Z")
    assert explain.explain(Case(failed_job(), [ended, guilty])).reason == "exit-code"


def test_what_a_training_survived_is_not_the_cause():
    tail = "\n".join(["CUDA out of memory, trying a smaller batch", *["step"] * 200, "ValueError: rows"])
    assert explain.explain(Case(failed_job(), [pod(code=1)], tails={0: tail})).reason == "exit-code"


def test_disruptions_are_transient():
    for reason in ("preempted", "evicted", "drained", "node-lost", "deleted", "admission"):
        assert explain.explain(Case(failed_job(), CASES[reason])).transient
    assert not explain.explain(Case(failed_job(), CASES["oom"])).transient


def test_kueue_reports_why_a_gang_waits():
    conditions = [
        {
            "type": "QuotaReserved",
            "status": "False",
            "reason": "Pending",
            "message": "insufficient unused quota for nvidia.com/gpu",
        }
    ]
    workload = {"spec": {"queueName": "training"}, "status": {"conditions": conditions}}
    assert (
        waits.kueue(workload)
        .sentence()
        .startswith("it waits in the queue training (insufficient unused quota")
    )
    admitted = {"status": {"conditions": [{"type": "Admitted", "status": "True"}]}}
    assert waits.kueue(admitted) is None


def test_a_quota_is_reported_even_without_pods():
    event = {
        "reason": "FailedCreate",
        "message": 'pods "x" is forbidden: exceeded quota: few, requested: requests.nvidia.com/gpu=8',
        "lastTimestamp": "2026-01-01T00:00:00Z",
    }
    cause = waits.explain(Case(JOB, [], [event], requested="2 x (8 GPUs, 4 CPUs, 16000 MB)"))
    assert cause.reason == "quota"
    assert "2 x (8 GPUs" in cause.sentence()


NOW = status.seconds("2026-01-01T00:10:00Z")


def warning(reason, message="no", about="sft-1-0-abcde", last="2026-01-01T00:09:00Z", **fields):
    return {
        "reason": reason,
        "message": message,
        "involvedObject": {"name": about},
        "lastTimestamp": last,
        **fields,
    }


def waiting_pod(rank=0, **fields):
    return pod(rank, phase="Pending", **fields)


MOUNT = 'MountVolume.SetUp failed for volume "x" : configmap "absent" not pod_status'


def test_a_recent_warning_explains_why_a_pod_waits():
    fresh = Case(JOB, [waiting_pod()], [warning("FailedMount", MOUNT)], now=NOW)
    assert waits.explain(fresh).reason == "FailedMount"
    again = warning(
        "FailedCreatePodSandBox", last=None, series={"lastObservedTime": "2026-01-01T00:09:50.000000Z"}
    )
    assert waits.explain(Case(JOB, [waiting_pod()], [again], now=NOW)).reason == "FailedCreatePodSandBox"


def test_an_old_warning_is_no_reason_to_stop_a_gang():
    """A mount failed and then succeeded; since then an image has been pulled for ten minutes."""
    old = warning("FailedMount", MOUNT, last="2026-01-01T00:01:00Z")
    assert waits.explain(Case(JOB, [waiting_pod()], [old], now=NOW)) is None
    ready = waiting_pod(conditions=[{"type": "PodReadyToStartContainers", "status": "True"}])
    for reason in ("FailedMount", "FailedCreatePodSandBox"):
        assert waits.explain(Case(JOB, [ready], [warning(reason)], now=NOW)) is None


def test_a_warning_about_a_running_pod_does_not_hide_one_about_a_waiting_pod():
    runs = pod(0, containerStatuses=[{"name": "main", "state": {"running": {}}}])
    events = [
        warning("FailedMount", "of the other", last="2026-01-01T00:09:30Z"),
        warning("FailedMount", MOUNT, about="sft-1-1-abcde"),
    ]
    assert (
        waits.explain(Case(JOB, [runs, waiting_pod(1)], events, now=NOW)).evidence == f"FailedMount: {MOUNT}"
    )


def unscheduled(message):
    entry = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return waiting_pod(conditions=[entry])


@pytest.mark.parametrize(
    "message",
    [
        '0/2 nodes are available: persistentvolumeclaim "absent" not pod_status. not pod_status.',
        "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: 0/2 nodes",
    ],
)
def test_a_missing_claim_is_not_mistaken_for_a_lack_of_nodes(message):
    cause = waits.explain(Case(JOB, [unscheduled(message)]))
    assert cause.reason == "claim"
    assert "create the claim" in cause.sentence()


def test_a_lack_of_nodes_names_the_request_and_what_nodes_lack():
    lack = unscheduled("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    sentence = waits.explain(Case(JOB, [lack], requested="1 x (99 GPUs, 1 CPUs, 1000 MB)")).sentence()
    assert (
        "requests 1 x (99 GPUs, 1 CPUs, 1000 MB) (0/2 nodes are available: 2 Insufficient nvidia" in sentence
    )


def test_a_quota_with_room_for_one_pod_of_two_is_reported():
    event = warning("FailedCreate", 'pods "x" is forbidden: exceeded quota: few', about="sft-1")
    assert waits.explain(Case(JOB, [pod()], [event], nodes=2)).reason == "quota"
    assert waits.explain(Case(JOB, [pod(), pod(1)], [event], nodes=2)) is None, "the quota had room for both"


def test_kueue_reports_that_it_has_requeued_a_gang():
    conditions = [
        {
            "type": "Evicted",
            "status": "True",
            "reason": "Preempted",
            "message": "Preempted to accommodate a workload",
        },
        {"type": "QuotaReserved", "status": "False", "message": "Preempted to accommodate a workload"},
    ]
    cause = waits.kueue({"spec": {"queueName": "training"}, "status": {"conditions": conditions}})
    assert cause.sentence().startswith("it was returned to the queue training")
    assert "Preempted to accommodate" in cause.sentence()


def test_a_training_may_survive_a_step_with_a_number_that_is_not_finite():
    tail = "step 7: grad_norm inf, step skipped\nTraceback\nKeyError: 'labels'\n"
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED\n"
    for text in (tail, tail + launcher):
        cause = explain.explain(Case(failed_job(), [pod(code=1)], tails={0: text}))
        assert (cause.reason, cause.evidence) == ("exit-code", "KeyError: 'labels'")
    for ended in (
        "error: the loss is nan at step 12: no batch is skipped",
        "FloatingPointError: loss is nan",
    ):
        text = f"{ended}\n{launcher}"
        assert explain.explain(Case(failed_job(), [pod(code=1)], tails={0: text})).reason == "nan"


def test_an_error_is_found_after_the_rank_that_torch_prefixes():
    text = "[rank1]: Traceback (most recent call last):\n[rank1]: KeyError: 'labels'\nbye\n"
    cause = explain.explain(Case(failed_job(), [pod(code=1)], tails={0: text}))
    assert cause.evidence == "[rank1]: KeyError: 'labels'"


def stuck_pod(kind, name, reason):
    """A pod of which one container, or init container, waits."""
    stuck = pod(phase="Pending", **{kind: [{"name": name, "state": {"waiting": {"reason": reason}}}]})
    stuck["spec"]["containers"].append({"name": "side", "image": "registry/side:1"})
    stuck["spec"]["initContainers"] = [{"name": "first", "image": "registry/first:1"}]
    return stuck


@pytest.mark.parametrize(
    ("kind", "name", "image"),
    [
        ("containerStatuses", "main", "x"),
        ("containerStatuses", "side", "registry/side:1"),
        ("initContainerStatuses", "first", "registry/first:1"),
    ],
)
def test_an_image_that_is_not_available_is_named(kind, name, image):
    """Also that of an init container: otherwise a gang of one pod would wait forever."""
    cause = waits.explain(Case(JOB, [stuck_pod(kind, name, "ImagePullBackOff")]))
    assert cause.what.endswith(f"cannot get its image {image}")


def test_an_init_container_that_cannot_be_configured_is_reported():
    stuck = stuck_pod("initContainerStatuses", "first", "CreateContainerConfigError")
    assert waits.explain(Case(JOB, [stuck])).reason == "CreateContainerConfigError"
