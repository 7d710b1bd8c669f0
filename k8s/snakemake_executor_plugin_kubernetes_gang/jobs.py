"""Converts a job of Snakemake to the gang that runs it."""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snakemake.benchmark import BenchmarkRecord, write_benchmark_records
from snakemake.io import is_flagged
from snakemake.shell import shell

from . import status
from .objects import FINGERPRINT, LABEL_WORKDIR_ID, PREFIX, TOKEN, WORKDIR, Json
from .settings import ExecutorSettings
from .spec import GangSpec, Queue, SpecError, Volume, cpus, digest, gang_name

THREAD_VARIABLES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "GOTO")
PASSED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
# A password in an address, with or without a scheme.
PASSWORD = re.compile(r"(?:^|[\s,])(?:[\w+.-]+://[^/\s]*|[^/:\s]+:[^/\s]*)@")


@dataclass(frozen=True)
class Site:
    """What all gangs of a run share. `state` is the directory of their state, `project` the Snakefile's path."""

    settings: ExecutorSettings
    workdir_id: str
    workdir: str
    project: str
    state: Path
    volumes: tuple[Volume, ...]
    template: Json
    gpu_template: Json
    secret_env: tuple[str, ...]


def is_direct(job: Any) -> bool:
    """Whether pods run the rule's own command; groups and scripts need a Snakemake in the pod."""
    return not job.is_group() and job.is_shell


def rule_name(job: Any) -> str:
    """Return the name of a job's rule, or the id of its group."""
    return str(job.groupid) if job.is_group() else str(job.rule.name)


def spec_of(job: Any, site: Site, inner_command: Callable[[Any], str]) -> GangSpec:
    """Return the gang for a job. `inner_command` returns the command of a job that needs Snakemake.

    Raises:
        SpecError: no gang can satisfy the rule's resources.
    """
    resources, settings = job.resources, site.settings
    nodes, gpus = int(resources.get("nodes", 1)), int(resources.get("gpus", 0))
    name = gang_name(rule_name(job), site.workdir_id, map(str, job.output))
    command, workdir = _command(job, site, inner_command, nodes)
    image = _image(job, site)
    memory_mb, threads = int(resources.get("mem_mb", 1000)), int(job.threads)
    mark, token = fingerprint(job, command, image, nodes, gpus), uuid.uuid4().hex
    return GangSpec(
        name=name,
        command=command,
        workdir=workdir,
        project=site.project,
        image=image,
        state_dir=str(site.state / name),
        token=token,
        uid=os.getuid(),
        gid=os.getgid(),
        backend=settings.backend,
        nodes=nodes,
        gpus=gpus,
        cpu=str(resources.get("cpu", _share(threads, nodes))),
        memory_mb=memory_mb,
        shm_mb=int(resources.get("shm_mb", memory_mb // 4)),
        runtime_s=60 * int(resources.get("runtime", 0)),
        start_timeout_s=settings.start_timeout,
        env=thread_variables(threads, nodes, resources) | _environment(settings),
        secret_env=dict.fromkeys(site.secret_env, settings.env_secret or ""),
        volumes=site.volumes,
        labels={LABEL_WORKDIR_ID: site.workdir_id},
        annotations={FINGERPRINT: mark, TOKEN: token, **_description(job, site)},
        queue=_queue(resources, settings),
        template=site.gpu_template if gpus else site.template,
    )


def _command(job: Any, site: Site, inner_command: Callable[[Any], str], nodes: int) -> tuple[str, str]:
    """The command that a job's pods run, and their working directory."""
    if is_direct(job):
        command = shell._get_process_prefix() + job.shellcmd + shell._process_suffix
        return command, str(Path(job.shadow_dir or site.workdir).absolute())
    if nodes > 1:
        raise SpecError(
            f"rule {rule_name(job)}: nodes={nodes}, but several pods can run only a shell: rule. Use shell:, or "
            "set nodes=1"
        )
    return inner_command(job), site.workdir


def superseding(spec: GangSpec) -> GangSpec:
    """Return the spec with a new token: its files stop the pods that have the old token."""
    return replace(spec, token=uuid.uuid4().hex)


def fingerprint(job: Any, command: str, image: str, nodes: int, gpus: int) -> str:
    """Return a digest that a running gang must have to be the one that this job needs.

    Memory, time and queue are left out: they may differ between attempts and do not change the result.
    """
    # The command of an inner Snakemake contains names of temporary files.
    text = command if is_direct(job) else rule_name(job)
    return digest(text, image, nodes, gpus, [(str(path), stamp) for path, stamp in _inputs(job)])


def _inputs(job: Any) -> Iterable[tuple[str, int]]:
    for path in job.input:
        if not is_flagged(path, "ancient") and os.path.exists(path):
            inside = Path(path, ".snakemake_timestamp")
            yield str(path), (inside if inside.exists() else Path(path)).stat().st_mtime_ns


def _image(job: Any, site: Site) -> str:
    container = None if job.is_group() else job.container_img_url
    image = container.removeprefix("docker://") if container else site.settings.image
    if not image:
        raise SpecError(
            f"rule {rule_name(job)}: no image. Set --kubernetes-gang-image or SNAKEMAKE_KUBERNETES_GANG_IMAGE, "
            "or the rule's container:"
        )
    return str(image)


def _share(threads: int, nodes: int) -> int:
    return math.ceil(threads / nodes)


def thread_variables(threads: int, nodes: int, resources: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that limit the threads of a pod's libraries to its CPUs.

    Snakemake reduces `threads` to the CPUs of the controller's machine, so a larger `cpu` counts. A smaller
    `cpu` does not: pods may use idle CPUs beyond their request.
    """
    count = max(_share(threads, nodes), int(cpus(str(resources.get("cpu", 1)))))
    return {f"{name}_NUM_THREADS": str(count) for name in THREAD_VARIABLES}


def _environment(settings: ExecutorSettings) -> dict[str, str]:
    # The image may not have the user: programs that need a name take this one.
    values = {"HOME": "/tmp", "TMPDIR": "/tmp", "USER": str(os.getuid())}
    for name in (*PASSED, *(settings.pass_env or ())):
        value = os.environ.get(name)
        if value is not None:
            values[name] = without_password(name, value)
    return values


def without_password(name: str, value: str) -> str:
    """Return the value of a variable that may appear in a manifest.

    Raises:
        SpecError: the value is an address with a password.
    """
    if PASSWORD.search(value):
        raise SpecError(
            f"{name} holds a password, which would be readable in every pod's manifest. Put {name} into a Secret "
            "and name that in the pod template (env, valueFrom, secretKeyRef), and unset it for Snakemake."
        )
    return value


def _queue(resources: Any, settings: ExecutorSettings) -> Queue | None:
    name = resources.get("queue")
    if not name:
        return None
    if not settings.queue_system:
        raise SpecError(
            f"resource queue={name}, but no queue system is set. Set --kubernetes-gang-queue-system"
        )
    return Queue(settings.queue_system, str(name), str(resources.get("priority", "")))


def _description(job: Any, site: Site) -> dict[str, str]:
    """Annotations for people who find the object."""
    wildcards = "" if job.is_group() else ",".join(f"{k}={v}" for k, v in job.wildcards_dict.items())
    return {
        PREFIX + "rule": rule_name(job),
        PREFIX + "wildcards": wildcards,
        WORKDIR: site.workdir,
    }


def write_log(job: Any, text: bytes) -> None:
    """Write the rule's log, unless its command has written it."""
    if job.log and not Path(job.log[0]).exists():
        Path(job.log[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(job.log[0]).write_bytes(text)


def write_benchmark(job: Any, pods: Iterable[Json], *, extended: bool) -> None:
    """Write the rule's benchmark: how long the pods ran, by the cluster's clock."""
    if not job.benchmark:
        return
    record = BenchmarkRecord(running_time=status.run_seconds(pods))
    record.jobid, record.rule_name, record.wildcards = job.jobid, job.rule.name, job.wildcards
    record.params, record.resources = job.params, job.resources
    record.input, record.threads = job.input, job.threads
    Path(job.benchmark).parent.mkdir(parents=True, exist_ok=True)
    write_benchmark_records([record], str(job.benchmark), extended)
