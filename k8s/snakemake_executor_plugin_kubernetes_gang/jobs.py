"""From a job of Snakemake to the gang that runs it."""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snakemake.benchmark import BenchmarkRecord, write_benchmark_records
from snakemake.io import is_flagged
from snakemake.shell import shell

from . import manifest, status, template
from .settings import ExecutorSettings
from .spec import GangSpec, Queue, SpecError, Volume, cpus, digest, gang_name

Json = dict[str, Any]

THREAD_VARIABLES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "GOTO")
PASSED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
# In an address, with a scheme or without.
PASSWORD = re.compile(r"(?:^|[\s,])(?:[\w+.-]+://[^/\s]*|[^/:\s]+:[^/\s]*)@")


@dataclass(frozen=True)
class Site:
    """What all gangs of a run share: where they run, as whom, and from which template."""

    settings: ExecutorSettings
    place: str
    workdir: str
    project: str
    state: Path
    volumes: tuple[Volume, ...]
    template: Json
    gpu_template: Json
    secret_env: tuple[str, ...]


def is_direct(job: Any) -> bool:
    """Whether the rule's own command is run; groups and scripts need a Snakemake in the pod."""
    return not job.is_group() and job.is_shell


def rule_name(job: Any) -> str:
    return str(job.groupid) if job.is_group() else str(job.rule.name)


def spec_of(job: Any, site: Site, inner_command: Any) -> GangSpec:
    """Return the gang for a job. `inner_command` makes the command of a job that needs Snakemake.

    Raises:
        SpecError: the rule asks for what no gang can give.
    """
    resources = job.resources
    nodes, gpus = int(resources.get("nodes", 1)), int(resources.get("gpus", 0))
    if nodes > 1 and not is_direct(job):
        raise SpecError(
            f"rule {rule_name(job)}: nodes={nodes}, but only a shell: rule can be run by several pods"
        )
    command = (
        shell._get_process_prefix() + job.shellcmd + shell._process_suffix
        if is_direct(job)
        else inner_command(job)
    )
    name = gang_name(rule_name(job), site.place, map(str, job.output))
    memory = int(resources.get("mem_mb", 1000))
    image = _image(job, site)
    mark = fingerprint(job, command, image, nodes, gpus)
    token, threads = uuid.uuid4().hex, thread_variables(int(job.threads), nodes, resources)
    return GangSpec(
        name=name, command=command, image=image, token=token, backend=site.settings.backend,
        workdir=str(Path(job.shadow_dir or site.workdir).absolute()) if is_direct(job) else site.workdir,
        project=site.project, state_dir=str(site.state / name), uid=os.getuid(), gid=os.getgid(),
        nodes=nodes, gpus=gpus, cpu=str(resources.get("cpu", _share(int(job.threads), nodes))), memory_mb=memory,
        shm_mb=int(resources.get("shm_mb", memory // 4)), runtime_s=60 * int(resources.get("runtime", 0)),
        start_timeout_s=site.settings.start_timeout, env=threads | _environment(site.settings),
        secret_env=dict.fromkeys(site.secret_env, site.settings.env_secret or ""), volumes=site.volumes,
        labels={manifest.LABEL_PLACE: site.place},
        annotations={manifest.FINGERPRINT: mark, manifest.TOKEN: token, **_description(job, site)},
        queue=_queue(resources, site.settings),
        template=site.gpu_template if gpus else site.template,
    )  # fmt: skip


def superseding(spec: GangSpec) -> GangSpec:
    """Return the spec with a token of its own: its files tell pods of the old token to stop."""
    return replace(spec, token=uuid.uuid4().hex)


def fingerprint(job: Any, command: str, image: str, nodes: int, gpus: int) -> str:
    """Return what must be equal for a running gang to be the one that this job asks for.

    Memory, time and queue are not in it: they may differ between attempts and change no result.
    """
    # The command of an inner Snakemake holds names of temporary files.
    text = command if is_direct(job) else rule_name(job)
    return digest(text, image, nodes, gpus, [(str(path), stamp) for path, stamp in _inputs(job)])


def _inputs(job: Any) -> Iterable[tuple[str, int]]:
    for path in job.input:
        if not is_flagged(path, "ancient") and os.path.exists(path):
            inside = Path(path, ".snakemake_timestamp")
            yield str(path), (inside if inside.exists() else Path(path)).stat().st_mtime_ns


def _image(job: Any, site: Site) -> str:
    own = None if job.is_group() else job.container_img_url
    image = own.removeprefix("docker://") if own else site.settings.image
    if not image:
        raise SpecError(
            f"rule {rule_name(job)}: no image. Set --kubernetes-gang-image or SNAKEMAKE_KUBERNETES_GANG_IMAGE, "
            "or the rule's container:"
        )
    return str(image)


def _share(threads: int, nodes: int) -> int:
    return math.ceil(threads / nodes)


def thread_variables(threads: int, nodes: int, resources: Mapping[str, Any]) -> dict[str, str]:
    """How many threads a pod's libraries start: its CPUs, where Snakemake has cut the rule's `threads`.

    It cuts them to what the controller's machine has. `cpu` may be less on purpose: idle CPUs may be used.
    """
    count = max(_share(threads, nodes), int(cpus(str(resources.get("cpu", 1)))))
    return {f"{name}_NUM_THREADS": str(count) for name in THREAD_VARIABLES}


def _environment(settings: ExecutorSettings) -> dict[str, str]:
    # The image need not know the user: programs that look for a name take this one.
    values = {"HOME": "/tmp", "TMPDIR": "/tmp", "USER": str(os.getuid())}
    for name in (*PASSED, *(settings.pass_env or ())):
        value = os.environ.get(name)
        if value is not None:
            values[name] = without_password(name, value)
    return values


def without_password(name: str, value: str) -> str:
    """Return a value that may stand in a manifest.

    Raises:
        SpecError: it is an address with a password.
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
    """What a person who finds the object wants to know."""
    wildcards = "" if job.is_group() else ",".join(f"{k}={v}" for k, v in job.wildcards_dict.items())
    return {
        template.PREFIX + "rule": rule_name(job),
        template.PREFIX + "wildcards": wildcards,
        manifest.WORKDIR: site.workdir,
    }


def write_log(job: Any, text: bytes) -> None:
    """Give the rule its log, where its command has not written one."""
    if job.log and not Path(job.log[0]).exists():
        Path(job.log[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(job.log[0]).write_bytes(text)


def write_benchmark(job: Any, pods: Iterable[status.Json], *, extended: bool) -> None:
    """Give the rule its benchmark: how long the pods ran, by the cluster's clock."""
    if not job.benchmark:
        return
    record = BenchmarkRecord(running_time=status.run_seconds(pods))
    record.jobid, record.rule_name, record.wildcards = job.jobid, job.rule.name, job.wildcards
    record.params, record.resources = job.params, job.resources
    record.input, record.threads = job.input, job.threads
    Path(job.benchmark).parent.mkdir(parents=True, exist_ok=True)
    write_benchmark_records([record], str(job.benchmark), extended)
