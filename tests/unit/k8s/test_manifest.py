"""Manifests against golden files, which tests/k8s sends to a real API server in a dry run.

`UPDATE_GOLDEN=1 pytest tests/unit/k8s/test_manifest.py` rewrites them; the diff is the review.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from snakemake_executor_plugin_kubernetes_gang import manifest, objects, template
from snakemake_executor_plugin_kubernetes_gang.entrypoint import ENTRYPOINT, POLL_S
from snakemake_executor_plugin_kubernetes_gang.spec import GangSpec, Queue, SpecError, Volume

GOLDEN = Path(__file__).parents[2] / "k8s" / "golden"
TEMPLATE = {
    "spec": {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "imagePullSecrets": [{"name": "registry"}],
        "containers": [
            {
                "name": "main",
                "env": [
                    {
                        "name": "HF_TOKEN",
                        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}},
                    }
                ],
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "resources": {"limits": {"rdma/rdma_shared_device_a": "1"}},
            }
        ],
    }
}


def spec(**changes: object) -> GangSpec:
    values = dict(
        name="sft-0123456789",
        command="set -euo pipefail; python train.py --cost $(cat cost)",
        workdir="/volume/run",
        project="/volume/code/Snakefile",
        image="registry.example/rlhf:1",
        state_dir="/volume/run/.snakemake/state/sft",
        token="11111111",
        uid=1000,
        gid=1000,
        volumes=(Volume("data", "/volume"),),
        runtime_s=3600,
        labels={objects.LABEL_WORKDIR_ID: "abcdef"},
        annotations={objects.FINGERPRINT: "f" * 64, objects.TOKEN: "11111111"},
        env={"HOME": "/tmp", "OMP_NUM_THREADS": "4"},
        cpu="4",
        memory_mb=16000,
        shm_mb=4000,
    )
    return GangSpec(**{**values, **changes})  # type: ignore[arg-type]


BIG = {"nodes": 2, "gpus": 8, "template": TEMPLATE}
CASES = {
    "job-one-pod": spec(secret_env={"HF_TOKEN": "hub"}),
    "job-gang-kueue": spec(**BIG, queue=Queue("kueue", "training", "high")),
    "job-gang-volcano": spec(**BIG, queue=Queue("volcano", "training", "high")),
    "job-t9k-queue": spec(queue=Queue("t9k", "default", "50"), backend="deepspeedjob"),
    "deepspeedjob": spec(**BIG, backend="deepspeedjob", queue=Queue("t9k", "default", "50")),
    "jobset": spec(**BIG, backend="jobset", queue=Queue("kueue", "training")),
    "trainjob": spec(**BIG, backend="trainjob"),
}


@pytest.mark.parametrize("name", CASES)
def test_manifests_are_the_golden_ones(name):
    text = yaml.safe_dump_all(manifest.manifests(CASES[name]), sort_keys=False)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; UPDATE_GOLDEN=1 rewrites it"


def test_pods_have_no_privileges():
    for name, case in CASES.items():
        text = (GOLDEN / f"{name}.yaml").read_text()
        assert "automountServiceAccountToken: false" in text
        assert "privileged: true" not in text
        if name != "deepspeedjob":
            assert "runAsNonRoot: true" in text
            assert "drop:\n" in text
        assert case.command not in text or "$$(cat cost)" not in case.command


def test_rules_without_gpus_are_jobs_under_every_backend():
    for backend in ("deepspeedjob", "jobset", "trainjob"):
        assert [body["kind"] for body in manifest.manifests(spec(backend=backend))] == ["Job"]


def test_a_gpu_is_requested_and_limited_alike():
    pod = manifest.manifests(spec(**BIG))[-1]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["requests"][manifest.GPU] == resources["limits"][manifest.GPU] == "8"
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def container_of(case: GangSpec) -> dict:
    body = manifest.manifests(case)[-1]["spec"]
    return (body.get("worker") or body)["template"]["spec"]["containers"][0]


def expanded(text: str) -> str:
    """A variable's value as the kubelet expands it: `$$` is a dollar, `$(X)` a variable, `$x` unchanged."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda match: "$" if match[0] == "$$" else "", text)


@pytest.mark.parametrize("command", ["echo $(cat cost)", "kill $$", "echo $HOME $$(id) $", "x=$((1 + 2))"])
def test_kubernetes_does_not_change_the_command(command):
    env = {
        e["name"]: e.get("value", "") for e in container_of(spec(command=command, env={"A": command}))["env"]
    }
    assert expanded(env["GANG_COMMAND"]) == command
    assert expanded(env["A"]) == command


def test_a_deepspeedjobs_command_is_in_a_file_with_its_quotes():
    case = dataclasses.replace(CASES["deepspeedjob"], command="echo 'it is' \"$HOME\"")
    text = manifest.files(case)["slot-11111111.sh"]
    assert "export GANG_COMMAND='echo '\"'\"'it is'\"'\"' \"$HOME\"'" in text
    assert "setpriv" in text


def test_a_late_slot_of_an_old_deepspeedjob_does_not_read_the_new_ones_token():
    """Its pods use their own file: with the new token in it, they would not stop."""
    [body] = manifest.manifests(CASES["deepspeedjob"])
    [name] = {Path(body["spec"]["config"]["run"]["exec"][-1]).name} & set(
        manifest.files(CASES["deepspeedjob"])
    )
    newer = dataclasses.replace(CASES["deepspeedjob"], token="22222222")
    assert name not in manifest.files(newer)


def test_root_in_a_deepspeedjobs_pods_has_its_own_home():
    """DeepSpeed's launcher reads the variables that the job's controller has written there."""
    names = {e["name"] for e in container_of(CASES["deepspeedjob"])["env"]}
    assert not {"HOME", "USER"} & names
    assert {"OMP_NUM_THREADS", "HF_TOKEN"} <= names


SLOT = """
import subprocess, sys
clean = {"HOME": "/root", "USER": "root", "PATH": "/usr/bin:/bin", "LOCAL_RANK": "1", "TOKEN": "forwarded"}
sys.exit(subprocess.call(["bash", sys.argv[1], "--local_rank=1"], env=clean))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the launcher's processes are root")
def test_a_slot_has_the_pods_environment_although_ssh_does_not_pass_it(tmp_path):
    """DeepSpeed's launcher starts it on another node with the image's python, but without its PATH."""
    command = "command -v python; echo $HOME $USER $MORE $LOCAL_RANK $TOKEN $WITH_REFERENCE"
    more = [{"name": "MORE", "value": "a $$HOME"}, {"name": "WITH_REFERENCE", "value": "$(MORE)"}]
    user = {"spec": {"containers": [{"name": "main", "env": more}]}}
    case = spec(
        backend="deepspeedjob",
        gpus=1,
        command=command,
        state_dir=str(tmp_path),
        workdir=str(tmp_path),
        project=str(tmp_path),
        uid=0,
        gid=0,
        template=user,
        env={"HOME": "/tmp", "USER": "1000"},
    )
    for name, text in manifest.files(case).items():
        (tmp_path / name).write_text(text)
    launcher = [sys.executable, "-c", SLOT, str(tmp_path / "slot-11111111.sh")]
    run = subprocess.run(launcher, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        f"{Path(sys.executable).parent}/python",
        "/tmp 1000 a $HOME 1 forwarded",
    ]


def test_a_token_that_cannot_be_read_for_a_moment_is_ignored(tmp_path):
    """For example during an outage of the volume: the pod continues and does not fill its log."""
    (tmp_path / "token").write_text("1\n")
    env = {
        "PATH": os.environ["PATH"],
        "GANG_STATE": str(tmp_path),
        "GANG_PROJECT": str(tmp_path),
        "GANG_TOKEN": "1",
        "GANG_WORKDIR": str(tmp_path),
        "GANG_COMMAND": "rm token; sleep 1; echo done",
    }
    text = ENTRYPOINT.replace(f"sleep {POLL_S} &", "sleep 0.1 &")
    run = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("done\n", "")


@pytest.mark.parametrize("priority", ["high", "101", "-1"])
def test_t9k_priorities_are_numbers(priority):
    with pytest.raises(SpecError, match="from 0 to 100"):
        manifest.manifests(spec(**BIG, backend="deepspeedjob", queue=Queue("t9k", "default", priority)))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"spec": {"restartPolicy": "Always"}}, "spec.restartPolicy"),
        ({"spec": {"securityContext": {"runAsUser": 0}}}, "runAsUser"),
        ({"spec": {"containers": [{"name": "main", "command": ["sh"]}]}}, "command"),
        ({"spec": {"containers": [{"name": "main", "resources": {"limits": {"memory": "1Gi"}}}]}}, "memory"),
        ({"spec": {"automountServiceAccountToken": True}}, "automountServiceAccountToken"),
        ({"spec": {"containers": [{"name": "main", "securityContext": {"privileged": True}}]}}, "privileged"),
        (
            {"spec": {"containers": [{"name": "main", "terminationMessagePolicy": "File"}]}},
            "terminationMessagePolicy",
        ),
        ({"metadata": {"labels": {"kubernetes-gang/place": "x"}}}, "kubernetes-gang/place"),
    ],
)
def test_what_a_template_may_not_set_is_refused_by_name(changes, path):
    with pytest.raises(SpecError, match=path.replace(".", r"\.")):
        template.check(changes, "pod.yaml")


def test_a_template_may_not_use_the_executors_names():
    for part in (
        {"env": [{"name": "NODE_RANK", "value": "0"}]},
        {"volumeMounts": [{"name": "x", "mountPath": "/dev/shm"}]},
    ):
        with pytest.raises(SpecError, match="is the executor's"):
            manifest.manifests(spec(template={"spec": {"containers": [{"name": "main", **part}]}}))


def test_a_template_overrides_passed_environment():
    user = {"spec": {"containers": [{"name": "main", "env": [{"name": "HOME", "value": "/home/me"}]}]}}
    env = manifest.manifests(spec(template=user))[-1]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [e["value"] for e in env if e["name"] == "HOME"] == ["/home/me"]


def test_templates_are_merged_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("spec: {nodeSelector: {gpu: a100, zone: x}}")
    (tmp_path / "b.yaml").write_text("spec: {nodeSelector: {gpu: h100}}")
    merged = template.load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert merged["spec"]["nodeSelector"] == {"gpu": "h100", "zone": "x"}


def test_a_later_template_adds_to_a_container_of_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "spec: {containers: [{name: main, env: [{name: HF_TOKEN, value: a}]}, {name: side, image: x}],"
        " initContainers: [{name: first, image: x}]}"
    )
    (tmp_path / "b.yaml").write_text(
        "spec: {containers: [{name: main, env: [{name: MORE, value: b}]}], initContainers: [{name: first, args: [y]}]}"
    )
    merged = template.load([tmp_path / "a.yaml", tmp_path / "b.yaml"])["spec"]
    assert [e["name"] for e in merged["containers"][0]["env"]] == ["HF_TOKEN", "MORE"]
    assert merged["initContainers"] == [{"name": "first", "image": "x", "args": ["y"]}]


def test_profiles_t9k_restores_ipc_lock_and_adds_rdma_on_request():
    folder = GOLDEN.parents[2] / "profiles" / "t9k"
    profile = yaml.safe_load((folder / "config.yaml").read_text())
    [named] = profile["kubernetes-gang-gpu-pod-template"]
    files = [folder.parents[1] / named]
    assert "rdma" not in str(files)
    for more in ([], [folder / "rdma.yaml"]):
        main = container_of(spec(**BIG | {"template": template.load(files + more)}, backend="deepspeedjob"))
        assert main["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert ("rdma/rdma_shared_device_a" in main["resources"]["limits"]) == bool(more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec:", "spec should be a mapping, not null"),
        ("metadata: [a]", 'metadata should be a mapping, not ["a"]'),
        ("metadata: {labels: x}", 'metadata.labels should be a mapping, not "x"'),
        ("spec:\n  containers:", "spec.containers should be a list of entries with name, not null"),
        ("spec: {containers: [main]}", 'spec.containers[0] should be an entry with name, not "main"'),
        (
            "spec: {containers: [{image: x}]}",
            'spec.containers[0] should be an entry with name, not {"image": "x"}',
        ),
        ("spec: {volumes: {a: b}}", 'spec.volumes should be a list of entries with name, not {"a": "b"}'),
        ("spec: {securityContext: }", "spec.securityContext should be a mapping, not null"),
        (
            "spec: {containers: [{name: main, env: [{name: A}, {value: x}]}]}",
            'spec.containers[main].env[1] should be an entry with name, not {"value": "x"}',
        ),
        (
            "spec: {initContainers: [{name: first, volumeMounts: [{name: a}]}]}",
            'spec.initContainers[first].volumeMounts[0] should be an entry with mountPath, not {"name": "a"}',
        ),
        (
            "spec: {containers: [{name: main, resources: }]}",
            "spec.containers[main].resources should be a mapping, not null",
        ),
        (
            "spec: {containers: [{name: main, resources: {limits: 2}}]}",
            "spec.containers[main].resources.limits should be a mapping, not 2",
        ),
        (
            "spec: {volumes: [{name: [a]}]}",
            'spec.volumes[0] should be an entry with name, not {"name": ["a"]}',
        ),
        (
            "spec: {volumes: [{name: 2026-01-01}, 2026-01-01]}",
            'spec.volumes[0] should be an entry with name, not {"name": "2026-01-01"}',
        ),
    ],
)
def test_a_template_value_of_the_wrong_type_is_named(tmp_path, text, message):
    (tmp_path / "pod.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        template.load([tmp_path / "pod.yaml"])
    assert str(caught.value) == f"pod template {tmp_path}/pod.yaml: {message}"


def test_names_of_lists_may_be_labels(tmp_path):
    text = "metadata: {labels: {env: prod}}\nspec: {nodeSelector: {volumes: fast}}"
    (tmp_path / "pod.yaml").write_text(text)
    assert template.load([tmp_path / "pod.yaml"])["spec"] == {"nodeSelector": {"volumes": "fast"}}


@pytest.mark.parametrize("text", ["[1]", "spec: {a: [", "replicas: 2"])
def test_a_file_that_is_not_a_pod_template_is_refused(tmp_path, text):
    (tmp_path / "pod.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"pod\.yaml"):
        template.load([tmp_path / "pod.yaml"])
