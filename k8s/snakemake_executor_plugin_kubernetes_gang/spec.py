"""What a gang is: N pods that run one command, as frozen values without Kubernetes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

QUEUE_SYSTEMS = ("kueue", "t9k", "volcano")
# A host name has at most 63 characters, and controllers append to a gang's name.
NAME_LENGTH = 40


class SpecError(ValueError):
    """A gang that cannot be created; the message says what to change."""


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim and the path at which the controller and the pods see it."""

    claim: str
    path: str
    sub_path: str = ""


@dataclass(frozen=True)
class Queue:
    """The queue in which a gang waits; `priority` is a class name, for t9k a number 0..100."""

    system: str
    name: str
    priority: str = ""


@dataclass(frozen=True)
class GangSpec:
    """A gang. Sizes are per pod: GPUs, CPUs (in Kubernetes' notation), MB (10^6 bytes).

    `runtime_s` counts from a pod's start. `project` is the path of the Snakefile, which pods must see.
    """

    name: str
    command: str
    workdir: str
    project: str
    image: str
    state_dir: str
    token: str
    uid: int
    gid: int
    backend: str = "job"
    nodes: int = 1
    gpus: int = 0
    cpu: str = "1"
    memory_mb: int = 1000
    shm_mb: int = 64
    runtime_s: int = 0
    start_timeout_s: int = 600
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    queue: Queue | None = None
    template: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < 0 or self.memory_mb < 1:
            raise SpecError(
                f"{self.name}: nodes={self.nodes}, gpus={self.gpus}, mem_mb={self.memory_mb}: nodes and mem_mb must "
                "be at least 1, gpus at least 0. Correct the rule's resources."
            )
        cpus(self.cpu)
        if self.shm_mb >= self.memory_mb:
            raise SpecError(
                f"{self.name}: shm_mb={self.shm_mb} does not fit into mem_mb={self.memory_mb}: shared memory "
                "counts as memory of the pod. Raise mem_mb or lower shm_mb."
            )


def cpus(text: str) -> float:
    """Return the number of CPUs that `2`, `0.5` or `500m` means."""
    if not re.fullmatch(r"\d+m|\d+(\.\d+)?", text):
        raise SpecError(f"cpu={text}: write CPUs like 2, 0.5 or 500m. Correct the rule's resources.")
    return int(text[:-1]) / 1000 if text.endswith("m") else float(text)


def parse_volume(text: str) -> Volume:
    """Return the volume that `claim:/path` or `claim:/path:sub/path` describes."""
    claim, _, rest = text.partition(":")
    path, _, sub_path = rest.partition(":")
    if not claim or not path.startswith("/"):
        raise SpecError(f"volume {text!r}: write claim:/path or claim:/path:sub/path")
    return Volume(claim, path.rstrip("/") or "/", sub_path)


def slug(text: str) -> str:
    """Return `text` as the beginning of an object's name: a letter first, then letters, digits, dashes."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (words if words[:1].isalpha() else f"r{words}")[: NAME_LENGTH - 11].rstrip("-")


def digest(*parts: object) -> str:
    """Return the SHA-256 of values that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def gang_name(rule: str, workdir_id: str, outputs: Iterable[str]) -> str:
    """Return the name of the gang that makes `outputs` in a working directory: the same in every run."""
    return f"{slug(rule)}-{digest(rule, workdir_id, sorted(outputs))[:10]}"


def workdir_identity(workdir: str, volumes: Iterable[Volume]) -> str:
    """Return an identity of a working directory that no other one in the namespace has."""
    return digest(workdir, sorted((v.claim, v.path, v.sub_path) for v in volumes))[:16]
