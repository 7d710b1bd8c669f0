"""Every failure that a real node can produce, provoked for real: the sentence names it.

All workflows run at once: what is waited for is the cluster, not the test.
"""

from __future__ import annotations

import pytest

import harness
from harness import kill, wait_until

# name: (directives of the rule, command). Each rule fails, or waits, in its own way.
FAILING = {
    "code": ("", "echo ValueError: too few rows >&2; exit 3"),
    "memory": ("resources: mem_mb=60, shm_mb=10", "python -c 'x = bytearray(10**9)'"),
    "deadline": ("resources: runtime=1", "sleep 200"),
    "nan": ("", "echo 'step 3: loss is nan, not finite'; exit 1"),
    "peer": (
        "resources: nodes=2, mem_mb=1000",
        """python -c 'if 1:
            import os, sys, time, datetime, torch.distributed as dist
            dist.init_process_group("gloo", rank=int(os.environ["NODE_RANK"]), world_size=2, timeout=datetime.timedelta(seconds=8))
            rank = dist.get_rank()
            if rank == 1: time.sleep(60)
            dist.barrier()'""",
    ),
    "image": ('container: "docker://registry.invalid/none:1"', "true"),
    "name": ('container: "docker://Not/a/Name:1:2"', "true"),
    "unschedulable": ("resources: gpus=99", "true"),
    "deleted": ("", "sleep 100"),
    "drained": ("", "sleep 100"),
    "disk": ("", "head -c 60000000 /dev/zero > /tmp/filler; sleep 100"),
    "rank": ("resources: nodes=2", "[ $NODE_RANK = 0 ] || exit 5; sleep 100"),
    "half": ("resources: nodes=3, cpu='1100m'", "sleep 100"),
    "killed": ("", "sleep 100 & kill -9 $!; wait $!"),
}  # fmt: skip


def snakefile(names) -> str:
    text = f"rule all:\n    input: {', '.join(repr(f'{n}.txt') for n in names)}\n"
    for name in names:
        directives, command = FAILING[name]
        text += f'rule {name}:\n    output: "{name}.txt"\n    {directives}\n    shell: r"""{command.replace("{", "{{").replace("}", "}}")}"""\n'
    return text


def pod_of(place, rule):
    found = [p for p in place.objects("pods") if p["metadata"]["name"].startswith(f"{rule}-")]
    return found[0]["metadata"]["name"] if found and found[0]["status"]["phase"] == "Running" else None


@pytest.fixture(scope="module")
def said():
    """What the controllers of all failing workflows print, by workflow."""
    gpus = [node["status"]["capacity"].get("nvidia.com/gpu") for node in harness.get("nodes")]
    if gpus != ["8", "8"]:
        pytest.skip(f"preemption and half a gang want two nodes with 8 GPUs each; here they have {gpus}")
    harness.kubectl("apply", "-f", "-", given={
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "missing"}, "handler": "missing",
    })  # fmt: skip
    for name, value in (("counted", 1), ("urgent", 1000)):
        harness.kubectl("apply", "-f", "-", given={
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value,
        })  # fmt: skip
    scope = {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["counted"]}]}
    harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given={
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"pods": "0"}, "scopeSelector": scope},
    })  # fmt: skip
    limited = {"resources": {"limits": {"ephemeral-storage": "20M"}}}
    many = harness.Workdir("failures", snakefile(FAILING), **limited)
    one = 'rule one:\n    output: "one.txt"\n    shell: "sleep 100"\n'
    places = {
        "many": many,
        "secret": harness.Workdir("no-secret", one, env=[{"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "x"}}}]),
        "mount": harness.Workdir("no-mount", one),
        "sandbox": harness.Workdir("no-sandbox", one),
        "volume": harness.Workdir("other-volume", one),
        "account": harness.Workdir("no-account", one),
        "quota": harness.Workdir("quota", one),
        "preempted": harness.Workdir("preempted", one.replace("    shell", "    resources: gpus=8\n    shell")),
        "urgent": harness.Workdir("urgent", one.replace("    shell", "    resources: gpus=8, runtime=1\n    shell").replace("100", "1")),
    }  # fmt: skip
    _edit(places["mount"], volumes=[{"name": "x", "configMap": {"name": "absent"}}])
    _edit(places["sandbox"], runtimeClassName="missing")
    _edit(places["account"], serviceAccountName="absent")
    _edit(places["quota"], priorityClassName="counted")
    processes = {name: place.start(*_options(name)) for name, place in places.items() if name != "urgent"}
    _act(many, places)
    for name, process in processes.items():
        if name not in WAITING:
            process.wait(200)
    wait_until(
        "the last of the failing gangs", lambda: many.said().count("Error in rule") == len(FAILING) - 1, 120
    )
    for name in WAITING:
        kill(processes[name])
    yield {name: place.said() for name, place in places.items()}
    harness.kubectl("delete", "resourcequota", "none", "-n", harness.NAMESPACE)
    for place in places.values():
        harness.kubectl(
            "delete", "jobs,services", "-n", harness.NAMESPACE, "-l", f"kubernetes-gang/place={place.place()}"
        )


def _edit(place, **spec) -> None:
    import yaml

    template = yaml.safe_load(place.template.read_text())
    for key, value in spec.items():
        template["spec"][key] = template["spec"].get(key, []) + value if isinstance(value, list) else value
    if "volumes" in spec:
        template["spec"]["containers"][0]["volumeMounts"].append({"name": "x", "mountPath": "/mnt"})
    place.template.write_text(yaml.safe_dump(template))


WAITING = ("many", "quota")  # one of their gangs waits for its turn for ever


def _options(name: str) -> list[str]:
    options = ["--kubernetes-gang-start-timeout", "20"]
    if name == "volume":
        # The claim's directory `elsewhere`, at the path where the controller has the claim itself.
        options += ["--kubernetes-gang-volumes", f"{harness.CLAIM}:{harness.volume()}:elsewhere"]
    return [*options, "--keep-going"]


def _act(many, places) -> None:
    """What others do to running pods: delete, evict, preempt."""
    victim = wait_until("preempted runs", lambda: pod_of(places["preempted"], "one"), 120)
    node = harness.get("pod", victim)[0]["spec"]["nodeName"]
    _edit(places["urgent"], priorityClassName="urgent", nodeSelector={"kubernetes.io/hostname": node})
    places["urgent"].start()
    victim = wait_until("deleted runs", lambda: pod_of(many, "deleted"), 120)
    harness.kubectl("delete", "pod", victim, "-n", harness.NAMESPACE, "--wait=false")
    drained = wait_until("drained runs", lambda: pod_of(many, "drained"), 60)
    path = f"/api/v1/namespaces/{harness.NAMESPACE}/pods/{drained}/eviction"
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": drained, "namespace": harness.NAMESPACE},
    }
    harness.kubectl("create", "--raw", path, "-f", "-", given=body)


SENTENCES = {
    "code": "ended with exit code 3 (ValueError: too few rows)",
    "memory": "was killed because it used more memory than its limit of 60M (OOMKilled, exit code 137)",
    "deadline": "the gang ran longer than its resource runtime allows",
    "nan": "training gave a number that is not finite",
    "peer": "processes waited in vain for each other",
    "image": "cannot get its image registry.invalid/none:1",
    "name": "InvalidImageName",
    "unschedulable": "no node can take pod unschedulable",
    "deleted": "was deleted while it ran",
    "drained": "was evicted, as when a node is drained",
    "disk": "was evicted by its node",
    "rank": "ended with exit code 5",
    "half": "only 2 of 3 pods started within 20 s",
    "killed": "ended with exit code 137 (SIGKILL)",
}


ELSEWHERE = {
    "secret": 'cannot be configured (CreateContainerConfigError: secret "absent" not found)',
    "mount": 'a volume cannot be mounted (FailedMount: MountVolume.SetUp failed for volume "x" : configmap "absent" not found)',
    "sandbox": "the node cannot set up the pod (FailedCreatePodSandBox",
    "account": "the cluster refuses this gang's pods (Error creating: pods \"one-",
    "volume": "this pod does not see the controller's working directory",
    "quota": "the namespace's quota leaves no room for this gang",
    "preempted": "was preempted by pods of a higher priority",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_failure_is_told_in_a_sentence(said, name):
    assert SENTENCES[name] in said["many"], said["many"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_pod_that_cannot_live_here_is_told_in_a_sentence(said, name):
    assert ELSEWHERE[name] in said[name], said[name]
