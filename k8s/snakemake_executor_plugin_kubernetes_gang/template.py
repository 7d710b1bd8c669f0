"""The user's pod template: how it is merged into a pod, and what it may not set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .objects import MAIN, PREFIX, Json
from .spec import SpecError

# The field that identifies an entry of a list. Other lists are appended.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "ports": "containerPort",
}
CONTAINER_LISTS = ("containers", "initContainers")
LISTS_OF_POD = (*CONTAINER_LISTS, "volumes", "imagePullSecrets")
LISTS_OF_CONTAINER = ("env", "volumeMounts", "ports")
REFUSED = {
    "spec.restartPolicy": "a gang is restarted as a whole",
    "spec.hostname": "pods find each other by host names",
    "spec.subdomain": "pods find each other by host names",
    "spec.activeDeadlineSeconds": "set the rule's resource runtime",
    "spec.automountServiceAccountToken": "a rule's command gets no permissions in the cluster",
    "spec.securityContext.runAsUser": "pods write as the controller's user",
    "spec.securityContext.runAsGroup": "pods write as the controller's user",
    "spec.securityContext.runAsNonRoot": "pods do not run as root",
    "spec.containers[main].securityContext.runAsUser": "pods write as the controller's user",
    "spec.containers[main].securityContext.runAsGroup": "pods write as the controller's user",
    "spec.containers[main].securityContext.runAsNonRoot": "pods do not run as root",
    "spec.containers[main].securityContext.privileged": "pods do not run as root",
    "spec.containers[main].terminationMessagePolicy": "the cause of a failure is read from it",
    "spec.containers[main].terminationMessagePath": "the cause of a failure is read from it",
    "spec.containers[main].command": "pods run the rule's command",
    "spec.containers[main].args": "pods run the rule's command",
    "spec.containers[main].workingDir": "it is Snakemake's working directory",
    "spec.containers[main].image": "set kubernetes-gang-image, or the rule's container:",
    "spec.containers[main].resources.limits.memory": "set the rule's resource mem_mb",
    "spec.containers[main].resources.requests.memory": "set the rule's resource mem_mb",
    "spec.containers[main].resources.requests.cpu": "set the rule's threads, or its resource cpu",
    "spec.containers[main].resources.limits.nvidia.com/gpu": "set the rule's resource gpus",
    "spec.containers[main].resources.requests.nvidia.com/gpu": "set the rule's resource gpus",
}


def load(paths: list[Path]) -> Json:
    """Return the files merged into one pod template, later files over earlier ones.

    Raises:
        SpecError: a file cannot be read, is not a pod template, or sets what belongs to the executor.
    """
    merged: Json = {}
    for path in paths:
        try:
            text = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SpecError(f"pod template {path}: cannot be read: {error}") from error
        if not isinstance(text, dict) or not set(text) <= {"metadata", "spec"}:
            raise SpecError(
                f"pod template {path}: only the keys metadata and spec are allowed, as in the template of a Job"
            )
        _check_shape(text, f"pod template {path}")
        check(text, str(path))
        merged = merge(merged, text)
    return merged


def check(template: Mapping[str, Any], origin: str) -> None:
    """Raise SpecError where the template sets what belongs to the executor."""
    for path in _paths(template, ""):
        if path in REFUSED:
            raise SpecError(f"pod template {origin}: {path} cannot be set here: {REFUSED[path]}")
        if path.startswith(("metadata.labels." + PREFIX, "metadata.annotations." + PREFIX)):
            raise SpecError(f"pod template {origin}: {path} cannot be set here: {PREFIX} is the executor's")


def _check_shape(template: Mapping[str, Any], origin: str) -> None:
    """Raise SpecError where the template cannot be merged. Null is refused as well: it would erase the base."""
    metadata, spec = (_mapping(template, key, "", origin) for key in ("metadata", "spec"))
    for key in ("labels", "annotations"):
        _mapping(metadata, key, "metadata.", origin)
    _mapping(spec, "securityContext", "spec.", origin)
    for key in LISTS_OF_POD:
        for entry in _entries(spec, key, "spec.", origin):
            if key in CONTAINER_LISTS:
                _check_container(entry, f"spec.{key}[{entry['name']}].", origin)


def _check_container(entry: Mapping[str, Any], at: str, origin: str) -> None:
    for key in LISTS_OF_CONTAINER:
        _entries(entry, key, at, origin)
    _mapping(entry, "securityContext", at, origin)
    resources = _mapping(entry, "resources", at, origin)
    for key in ("limits", "requests"):
        _mapping(resources, key, f"{at}resources.", origin)


def _mapping(parent: Mapping[str, Any], key: str, at: str, origin: str) -> Mapping[str, Any]:
    value = parent.get(key, {})
    if not isinstance(value, Mapping):
        raise SpecError(f"{origin}: {at}{key} should be a mapping, not {_shown(value)}")
    return value


def _entries(parent: Mapping[str, Any], key: str, at: str, origin: str) -> list[Mapping[str, Any]]:
    value, name = parent.get(key, []), KEYS[key]
    if not isinstance(value, list):
        raise SpecError(f"{origin}: {at}{key} should be a list of entries with {name}, not {_shown(value)}")
    for n, entry in enumerate(value):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(name), str | int):
            raise SpecError(f"{origin}: {at}{key}[{n}] should be an entry with {name}, not {_shown(entry)}")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _paths(value: Any, path: str) -> list[str]:
    """Every value of a template as a dotted path; entries of keyed lists by their name."""
    if isinstance(value, Mapping):
        return [p for k, v in value.items() for p in _paths(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list):
        named = [(v.get("name", i) if isinstance(v, Mapping) else i, v) for i, v in enumerate(value)]
        return [path, *(p for name, v in named for p in _paths(v, f"{path}[{name}]"))]
    return [path]


def merge(base: Any, extra: Any, key: str = "") -> Any:
    """Return `base` with `extra` merged over it: mappings by key, lists by their entries' names."""
    if isinstance(base, Mapping) and isinstance(extra, Mapping):
        return {**base, **{k: merge(base[k], v, k) if k in base else v for k, v in extra.items()}}
    if isinstance(base, list) and isinstance(extra, list):
        return _merge_lists(base, extra, key)
    return extra


def _merge_lists(base: list[Any], extra: list[Any], key: str) -> list[Any]:
    if key not in KEYS:
        return [*base, *(entry for entry in extra if entry not in base)]
    field = KEYS[key]
    merged = {entry[field]: entry for entry in base}
    for entry in extra:
        name = entry[field]
        # Only containers are merged: a volume or variable with fields of two would be invalid.
        merged[name] = merge(merged[name], entry) if name in merged and key in CONTAINER_LISTS else entry
    return list(merged.values())


def apply(template: Mapping[str, Any], pod: Json, reserved_env: set[str]) -> Json:
    """Return the executor's pod template with the user's merged over it.

    Raises:
        SpecError: the template names a volume, mount or variable that the executor sets.
    """
    user_spec, spec = template.get("spec", {}), pod["spec"]
    user_main: Json = next((c for c in user_spec.get("containers", []) if c["name"] == MAIN), {})
    mounts = _names(spec["containers"][0], "volumeMounts", "mountPath")
    for kind, ours, theirs in (
        ("volume", _names(spec, "volumes", "name"), _names(user_spec, "volumes", "name")),
        ("mount", mounts, _names(user_main, "volumeMounts", "mountPath")),
        ("env", reserved_env, _names(user_main, "env", "name")),
    ):
        if ours & theirs:
            names = ", ".join(sorted(ours & theirs))
            raise SpecError(f"pod template: {kind} {names} is the executor's; rename yours")
    result: Json = merge(pod, template)
    return result


def _names(part: Mapping[str, Any], key: str, name: str) -> set[str]:
    return {entry[name] for entry in part.get(key, [])}
