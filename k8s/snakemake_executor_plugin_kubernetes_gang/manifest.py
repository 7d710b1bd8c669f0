"""Manifests: pure functions from a spec to the objects that a cluster is asked for.

A backend's last object is the gang; those before it serve it and are given to it as their owner.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from . import template
from .entrypoint import AS_OWNER, ENTRYPOINT, ENVIRONMENT
from .spec import GangSpec, Queue, SpecError

Json = dict[str, Any]

PORT = 29500
GPU = "nvidia.com/gpu"
LABEL_PLACE = template.PREFIX + "place"
LABEL_GANG = template.PREFIX + "gang"
FINGERPRINT = template.PREFIX + "fingerprint"
TOKEN = template.PREFIX + "token"
WORKDIR = template.PREFIX + "workdir"
MANAGED_BY = {"app.kubernetes.io/managed-by": "kubernetes-gang"}
INDEX = "metadata.labels['batch.kubernetes.io/job-completion-index']"
KEEP_S = 7 * 24 * 3600  # a net: the controller deletes a gang once Snakemake has recorded its end
KINDS = {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob", "deepspeedjob": "DeepSpeedJob"}
ROLE = "gang"  # the replicated job of a JobSet
RESERVED_ENV = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}


def manifests(spec: GangSpec) -> list[Json]:
    """Return the objects of a gang, in the order in which they are created."""
    return BACKENDS[backend_of(spec)](spec)


def backend_of(spec: GangSpec) -> str:
    """Rules without GPUs are plain jobs under every backend: they need no launcher."""
    return spec.backend if spec.gpus else "job"


def kind_of(spec: GangSpec) -> str:
    """Return the kind of a gang's last object."""
    return KINDS[backend_of(spec)]


def _indexed_job(spec: GangSpec) -> list[Json]:
    body = _object("batch/v1", "Job", spec)
    _queue_labels(body, spec.queue)
    pod = _pod(spec, f"{spec.name}-0.{spec.name}")
    if spec.nodes > 1:
        pod["spec"]["subdomain"] = spec.name
    body["spec"] = {**_job_spec(spec, pod), "ttlSecondsAfterFinished": KEEP_S}
    return [*([_service(spec)] if spec.nodes > 1 else []), body]


def _job_spec(spec: GangSpec, pod: Json) -> Json:
    """A gang ends with its first failed pod, and no pod is replaced beside its predecessor."""
    return {
        "completionMode": "Indexed", "completions": spec.nodes, "parallelism": spec.nodes,
        "backoffLimit": 0, "podReplacementPolicy": "Failed", "template": pod,
    }  # fmt: skip


def _service(spec: GangSpec) -> Json:
    body = _object("v1", "Service", spec)
    body["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {LABEL_GANG: spec.name},
        "ports": [{"name": "rendezvous", "port": PORT}],
    }
    return body


def _jobset(spec: GangSpec) -> list[Json]:
    body = _object("jobset.x-k8s.io/v1alpha2", "JobSet", spec)
    _queue_labels(body, spec.queue)
    body["spec"] = {**_jobset_template(spec, ROLE), "ttlSecondsAfterFinished": KEEP_S}
    return [body]


def _jobset_template(spec: GangSpec, role: str) -> Json:
    pod = _pod(spec, f"{spec.name}-{role}-0-0.{spec.name}")
    job = {"metadata": {"labels": _labels(spec)}, "spec": _job_spec(spec, pod)}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [{"name": role, "replicas": 1, "template": job}],
    }


def _trainjob(spec: GangSpec) -> list[Json]:
    """A TrainJob and a runtime of its own: what a TrainJob may override differs between versions."""
    role = "node"  # the name under which Trainer looks for the job that trains, and for its container
    runtime = _object("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", spec)
    runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] = "torch"
    shape = _jobset_template(spec, role)
    job = shape["replicatedJobs"][0]["template"]
    job["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] = "trainer"
    _rename_main(job["spec"]["template"], role)
    runtime["spec"] = {"mlPolicy": {"numNodes": spec.nodes}, "template": {"spec": shape}}
    body = _object("trainer.kubeflow.org/v1alpha1", "TrainJob", spec)
    _queue_labels(body, spec.queue)
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": spec.name}
    body["spec"] = {"runtimeRef": reference, "trainer": {"numNodes": spec.nodes}}
    return [runtime, body]


def _deepspeedjob(spec: GangSpec) -> list[Json]:
    body = _object("batch.tensorstack.dev/v1beta1", "DeepSpeedJob", spec)
    pod = _pod(spec, None)
    _as_root(pod)
    _rename_main(pod, "worker")
    body["spec"] = {
        # From a file: the launcher passes the command through ssh, where quotes do not survive.
        "config": {"slotsPerWorker": spec.gpus, "run": {"exec": ["bash", f"{spec.state_dir}/{_slot(spec)}"]}},
        "runPolicy": {"backoffLimit": 0, "cleanUpPolicy": "Unfinished"},
        "worker": {"replicas": spec.nodes, "restartPolicy": "Never", "template": pod},
    }
    if spec.queue and spec.queue.system == "t9k":
        body["spec"]["scheduler"] = {"t9kScheduler": _t9k_queue(spec.queue)}
    return [body]


def _t9k_queue(queue: Queue) -> Json:
    if not queue.priority:
        return {"queue": queue.name}
    if not queue.priority.isdigit() or int(queue.priority) > 100:
        raise SpecError(
            f"priority {queue.priority!r} of queue {queue.name}: t9k takes a number from 0 to 100"
        )
    return {"queue": queue.name, "priority": int(queue.priority)}


def _as_root(pod: Json) -> None:
    """sshd in DeepSpeedJob's pods needs root and its capabilities; see entrypoint.AS_OWNER."""
    security = pod["spec"]["securityContext"]
    pod["spec"]["securityContext"] = {"fsGroup": security["fsGroup"], "fsGroupChangePolicy": "OnRootMismatch"}
    container = pod["spec"]["containers"][0]
    add = container["securityContext"].get("capabilities", {}).get("add", [])
    container["securityContext"] = {"capabilities": {"add": add}} if add else {}
    del container["command"], container["args"]
    # The launcher looks in root's home for the variables that the controller has written down.
    container["env"] = [entry for entry in container["env"] if entry["name"] not in ("HOME", "USER")]


def _slot(spec: GangSpec) -> str:
    """A file of this very gang's: a late process of an old one must not take the new one's token for its own."""
    return f"slot-{spec.token}.sh"


def _rename_main(pod: Json, name: str) -> None:
    for container in pod["spec"]["containers"]:
        if container["name"] == template.MAIN:
            container["name"] = name


def _object(api_version: str, kind: str, spec: GangSpec) -> Json:
    metadata = {"name": spec.name, "labels": _labels(spec), "annotations": dict(spec.annotations)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _labels(spec: GangSpec) -> Json:
    return {**MANAGED_BY, **spec.labels, LABEL_GANG: spec.name}


def _queue_labels(body: Json, queue: Queue | None) -> None:
    if queue and queue.system == "kueue":
        body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue.name
        if queue.priority:
            body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = queue.priority


def _pod(spec: GangSpec, master: str | None) -> Json:
    """The template of a gang's pods; `master` is rank 0's host name, None where a launcher sets it."""
    pod: Json = {
        "metadata": {"labels": _labels(spec), "annotations": {}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": spec.uid, "runAsGroup": spec.gid, "fsGroup": spec.gid,
                "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(spec, master)],
            "volumes": _volumes(spec),
        },
    }  # fmt: skip
    if spec.runtime_s:  # on the pod, not on the job: time in a queue does not count
        pod["spec"]["activeDeadlineSeconds"] = spec.runtime_s
    _queue_pod(pod, spec)
    return template.apply(spec.template, pod, RESERVED_ENV | set(_gang_values(spec)))


def _queue_pod(pod: Json, spec: GangSpec) -> None:
    """Queues that know pods rather than jobs. DeepSpeedJob's controller does this for its own pods."""
    queue = spec.queue
    if queue and queue.system == "volcano":
        pod["spec"]["schedulerName"] = "volcano"
        pod["metadata"]["annotations"] |= {
            "scheduling.volcano.sh/queue-name": queue.name,
            "scheduling.volcano.sh/group-min-member": str(spec.nodes),
        }
        if queue.priority:
            pod["spec"]["priorityClassName"] = queue.priority
    elif queue and queue.system == "t9k" and backend_of(spec) != "deepspeedjob":
        pod["spec"]["schedulerName"] = "t9k-scheduler"
        pod["metadata"]["labels"]["scheduler.tensorstack.dev/queue"] = queue.name


def _container(spec: GangSpec, master: str | None) -> Json:
    return {
        "name": template.MAIN,
        "image": spec.image,
        "command": ["bash", "-c"],
        "args": [ENTRYPOINT],
        "env": [*_own_env(spec, master), *_user_env(spec)],
        "resources": _resources(spec),
        "volumeMounts": _mounts(spec),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def _gang_values(spec: GangSpec) -> dict[str, str]:
    """What entrypoint.ENTRYPOINT reads."""
    return {
        "GANG_COMMAND": spec.command, "GANG_WORKDIR": spec.workdir, "GANG_PROJECT": spec.project,
        "GANG_STATE": spec.state_dir, "GANG_TOKEN": spec.token, "GANG_START_TIMEOUT": str(spec.start_timeout_s),
    }  # fmt: skip


def files(spec: GangSpec) -> dict[str, str]:
    """Return what must lie in the gang's state directory before it is created, by file name."""
    token = {"token": spec.token + "\n"}
    if backend_of(spec) != "deepspeedjob":
        return token
    values = {**_plain_env(spec), **_gang_values(spec), "GANG_UID": str(spec.uid), "GANG_GID": str(spec.gid)}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    return {**token, _slot(spec): ENVIRONMENT + exports + AS_OWNER, "entrypoint.sh": ENTRYPOINT}


def _plain_env(spec: GangSpec) -> dict[str, str]:
    """The pod's variables whose values stand in its manifest, the template's among them."""
    entries = _pod(spec, None)["spec"]["containers"][0]["env"]
    values = {entry["name"]: entry["value"] for entry in entries if "value" in entry}
    return {name: v.replace("$$", "$") for name, v in values.items() if "$(" not in v.replace("$$", "")}


def _env(values: Mapping[str, str]) -> list[Json]:
    # Kubernetes replaces `$(NAME)` in a value, and makes `$` of `$$`.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in values.items()]


def _own_env(spec: GangSpec, master: str | None) -> list[Json]:
    if master is None:
        return []
    return [
        *_env(_gang_values(spec)),
        {"name": "NNODES", "value": str(spec.nodes)},
        {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
        {"name": "MASTER_ADDR", "value": master if spec.nodes > 1 else "127.0.0.1"},
        {"name": "MASTER_PORT", "value": str(PORT)},
    ]


def _user_env(spec: GangSpec) -> list[Json]:
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": holder, "key": name}}}
        for name, holder in spec.secret_env.items()
    ]
    return [*_env(spec.env), *secret]


def _resources(spec: GangSpec) -> Json:
    """Memory and GPUs are guaranteed; idle CPUs may be used beyond the request."""
    memory, gpus = f"{spec.memory_mb}M", {GPU: str(spec.gpus)} if spec.gpus else {}
    return {
        "requests": {"cpu": spec.cpu, "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }


def _volumes(spec: GangSpec) -> list[Json]:
    claims = sorted({volume.claim for volume in spec.volumes})
    return [
        *({"name": f"claim-{n}", "persistentVolumeClaim": {"claimName": c}} for n, c in enumerate(claims)),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{spec.shm_mb}M"}},
    ]


def _mounts(spec: GangSpec) -> list[Json]:
    claims = sorted({volume.claim for volume in spec.volumes})
    mounts: list[Json] = [
        {
            "name": f"claim-{claims.index(v.claim)}",
            "mountPath": v.path,
            **({"subPath": v.sub_path} if v.sub_path else {}),
        }
        for v in spec.volumes
    ]
    return [*mounts, {"name": "shm", "mountPath": "/dev/shm"}]


BACKENDS: dict[str, Callable[[GangSpec], list[Json]]] = {
    "job": _indexed_job, "deepspeedjob": _deepspeedjob, "trainjob": _trainjob, "jobset": _jobset,
}  # fmt: skip
