"""Manifests: pure functions from a spec to the objects to create.

The last object of a backend is the gang; those before it are helpers, which the gang will own.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

from . import template
from .entrypoint import AS_OWNER, ENTRYPOINT, ENVIRONMENT
from .objects import (
    DEEPSPEEDJOB_MAIN,
    INDEX_LABEL,
    KINDS,
    LABEL_GANG,
    MAIN,
    MANAGED_BY,
    RESOURCES,
    TRAINJOB_MAIN,
    Json,
)
from .spec import GangSpec, Queue, SpecError

PORT = 29500
GPU = "nvidia.com/gpu"
INDEX = f"metadata.labels['{INDEX_LABEL}']"
KEEP_S = 7 * 24 * 3600  # a fallback: the controller deletes a gang once Snakemake has recorded its end
GRACE_S, SAVED_MB_PER_S = 60, 200  # for a step and the ends of processes; what a slow volume takes
ROLE = "gang"  # name of a JobSet's replicated job
RESERVED_ENV = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}


def manifests(spec: GangSpec) -> list[Json]:
    """Return the objects of a gang in the order of creation."""
    return BUILDERS[backend_of(spec)](spec)


def backend_of(spec: GangSpec) -> str:
    """Return a gang's backend: without GPUs always a plain job, which needs no launcher."""
    return spec.backend if spec.gpus else "job"


def kind_of(spec: GangSpec) -> str:
    """Return the kind of a gang's last object."""
    return KINDS[backend_of(spec)]


def _indexed_job(spec: GangSpec) -> list[Json]:
    body = _object("Job", spec)
    _queue_labels(body, spec.queue)
    pod = _pod(spec, f"{spec.name}-0.{spec.name}")
    if spec.nodes > 1:
        pod["spec"]["subdomain"] = spec.name
    body["spec"] = {**_job_spec(spec, pod), "ttlSecondsAfterFinished": KEEP_S}
    return [*([_service(spec)] if spec.nodes > 1 else []), body]


def _job_spec(spec: GangSpec, pod: Json) -> Json:
    """The first failed pod ends the gang, and no pod runs beside its replacement."""
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": pod,
    }


def _service(spec: GangSpec) -> Json:
    body = _object("Service", spec)
    body["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {LABEL_GANG: spec.name},
        "ports": [{"name": "rendezvous", "port": PORT}],
    }
    return body


def _jobset(spec: GangSpec) -> list[Json]:
    body = _object("JobSet", spec)
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
    """A TrainJob and its own runtime: what a TrainJob may override differs between versions."""
    role = TRAINJOB_MAIN  # Trainer requires this name for the replicated job, too
    runtime = _object("TrainingRuntime", spec)
    runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] = "torch"
    shape = _jobset_template(spec, role)
    job = shape["replicatedJobs"][0]["template"]
    job["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] = "trainer"
    _rename_main(job["spec"]["template"], role)
    runtime["spec"] = {"mlPolicy": {"numNodes": spec.nodes}, "template": {"spec": shape}}
    body = _object("TrainJob", spec)
    _queue_labels(body, spec.queue)
    group, _, _ = runtime["apiVersion"].partition("/")
    reference = {"apiGroup": group, "kind": runtime["kind"], "name": spec.name}
    body["spec"] = {"runtimeRef": reference, "trainer": {"numNodes": spec.nodes}}
    return [runtime, body]


def _deepspeedjob(spec: GangSpec) -> list[Json]:
    body = _object("DeepSpeedJob", spec)
    pod = _pod(spec, None)
    _as_root(pod)
    _rename_main(pod, DEEPSPEEDJOB_MAIN)
    body["spec"] = {
        # A file: the launcher passes the command through ssh, which loses quotes.
        "config": {
            "slotsPerWorker": spec.gpus,
            "run": {"exec": ["bash", f"{spec.state_dir}/{_slot_file(spec)}"]},
        },
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
            f"priority {queue.priority!r} of queue {queue.name}: t9k takes a number from 0 to 100. Correct the rule's resource priority"
        )
    return {"queue": queue.name, "priority": int(queue.priority)}


def _as_root(pod: Json) -> None:
    """Run a DeepSpeedJob's pods as root, because their sshd needs it; see entrypoint.AS_OWNER."""
    security = pod["spec"]["securityContext"]
    pod["spec"]["securityContext"] = {"fsGroup": security["fsGroup"], "fsGroupChangePolicy": "OnRootMismatch"}
    container = pod["spec"]["containers"][0]
    add = container["securityContext"].get("capabilities", {}).get("add", [])
    container["securityContext"] = {"capabilities": {"add": add}} if add else {}
    del container["command"], container["args"]
    # The launcher reads variables from a file in root's home, which the job's controller has written.
    container["env"] = [entry for entry in container["env"] if entry["name"] not in ("HOME", "USER")]


def _slot_file(spec: GangSpec) -> str:
    """A file name with the token: a late process of an earlier gang must not read the new token."""
    return f"slot-{spec.token}.sh"


def _rename_main(pod: Json, name: str) -> None:
    for container in pod["spec"]["containers"]:
        if container["name"] == MAIN:
            container["name"] = name


def _object(kind: str, spec: GangSpec) -> Json:
    version, _ = RESOURCES[kind]
    metadata = {"name": spec.name, "labels": _labels(spec), "annotations": dict(spec.annotations)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _labels(spec: GangSpec) -> Json:
    return {**MANAGED_BY, **spec.labels, LABEL_GANG: spec.name}


def _queue_labels(body: Json, queue: Queue | None) -> None:
    if queue and queue.system == "kueue":
        body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue.name
        if queue.priority:
            body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = queue.priority


def _pod(spec: GangSpec, master: str | None) -> Json:
    """The template of a gang's pods; `master` is rank 0's host name, None if a launcher sets it."""
    pod: Json = {
        "metadata": {"labels": _labels(spec), "annotations": {}},
        "spec": {
            "restartPolicy": "Never",
            # A training saves its state at SIGTERM, which is not larger than its memory.
            "terminationGracePeriodSeconds": GRACE_S + spec.memory_mb // SAVED_MB_PER_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": spec.uid,
                "runAsGroup": spec.gid,
                "fsGroup": spec.gid,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(spec, master)],
            "volumes": _volumes(spec),
        },
    }
    if spec.runtime_s:  # on the pod, not on the job: time in a queue does not count
        pod["spec"]["activeDeadlineSeconds"] = spec.runtime_s
    _queue_pod(pod, spec)
    return template.apply(spec.template, pod, RESERVED_ENV | set(_gang_values(spec)))


def _queue_pod(pod: Json, spec: GangSpec) -> None:
    """Mark a pod for queues that schedule pods, not jobs. DeepSpeedJob's controller marks its own pods."""
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
        "name": MAIN,
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
    """The parameters of entrypoint.ENTRYPOINT."""
    return {
        "GANG_COMMAND": spec.command,
        "GANG_WORKDIR": spec.workdir,
        "GANG_PROJECT": spec.project,
        "GANG_STATE": spec.state_dir,
        "GANG_TOKEN": spec.token,
        "GANG_START_TIMEOUT": str(spec.start_timeout_s),
    }


def files(spec: GangSpec) -> dict[str, str]:
    """Return the files that pods read from the gang's state directory, by name."""
    token = {"token": spec.token + "\n"}
    if backend_of(spec) != "deepspeedjob":
        return token
    values = {**_plain_env(spec), **_gang_values(spec), "GANG_UID": str(spec.uid), "GANG_GID": str(spec.gid)}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    return {**token, _slot_file(spec): ENVIRONMENT + exports + AS_OWNER, "entrypoint.sh": ENTRYPOINT}


def _plain_env(spec: GangSpec) -> dict[str, str]:
    """The variables whose values are in the pod's manifest, including those of the template."""
    entries = _pod(spec, None)["spec"]["containers"][0]["env"]
    values = {entry["name"]: entry["value"] for entry in entries if "value" in entry}
    return {name: v.replace("$$", "$") for name, v in values.items() if "$(" not in v.replace("$$", "")}


def _env(values: Mapping[str, str]) -> list[Json]:
    # Kubernetes replaces `$(NAME)` in a value, and `$$` by `$`.
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
    """Memory and GPUs are limited to the request; a pod may use idle CPUs beyond it."""
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


BUILDERS: dict[str, Callable[[GangSpec], list[Json]]] = {
    "job": _indexed_job,
    "deepspeedjob": _deepspeedjob,
    "trainjob": _trainjob,
    "jobset": _jobset,
}
