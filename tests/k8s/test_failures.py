"""Every failure that a real node can produce, provoked for real: the sentence names it.

All workflows run at once: what is waited for is the cluster, not the test.
"""

from __future__ import annotations

import re

import pytest

import harness
from harness import kill, wait_until

# name: (directives of the rule, command). Each rule fails, or waits, in its own way.
FAILING = {
    "code": ("", "echo ValueError: too few rows >&2; exit 3"),
    "memory": ("resources: mem_mb=60, shm_mb=10", "python -c 'x = bytearray(10**9)'"),
    "deadline": ("resources: runtime=1", "sleep 200"),
    "nan": (
        "resources: mem_mb=2000",
        f"""python -c 'if 1:
            import sys, types, torch
            sys.path.insert(0, "{harness.REPO}/scripts")
            from rlhf.training import engine
            trained = types.SimpleNamespace(global_steps=3, fp16_enabled=lambda: False)
            trained.micro_batch_losses, trained.gradient_accumulation_steps = [torch.tensor(float("nan"))], lambda: 1
            engine.step(trained)'""",
    ),
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
    "rank": (
        "resources: nodes=2, cpu='20m'",
        "echo last words of rank $NODE_RANK; sleep 3; [ $NODE_RANK = 0 ] || exit 5; sleep 100",
    ),
    "first": (
        "resources: nodes=3, cpu='20m'",
        "echo last words of rank $NODE_RANK; sleep 5; [ $NODE_RANK != 0 ] || exit 6; sleep 100",
    ),
    "half": ("resources: nodes=3, cpu='1100m'", "sleep 100"),
    "killed": ("", "sleep 100 & kill -9 $!; wait $!"),
}


def snakefile(names) -> str:
    text = f"rule all:\n    input: {', '.join(repr(f'{n}.txt') for n in names)}\n"
    for name in names:
        directives, command = FAILING[name]
        again = "retries: 1" if name == "code" else ""
        text += f'rule {name}:\n    output: "{name}.txt"\n    {directives}\n    {again}\n    shell: r"""{command.replace("{", "{{").replace("}", "}}")}"""\n'
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
    for given in CLUSTER_OBJECTS:
        harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given=given)
    places = _workflows()
    many = places["many"]
    processes = {name: place.start(*_options(name)) for name, place in places.items() if name != "urgent"}
    try:
        _act(many, places)
        for name, process in processes.items():
            if name not in WAITING:
                process.wait(200)
        wait_until(
            # One waits for ever, another is tried twice.
            "the last of the failing gangs",
            lambda: many.said().count("Error in rule") >= len(FAILING),
            120,
        )
    finally:
        for process in processes.values():
            kill(process)
    yield {name: place.said() for name, place in places.items()}
    harness.kubectl("delete", "resourcequota", "none", "-n", harness.NAMESPACE)
    for place in places.values():
        harness.kubectl(
            "delete", "jobs,services", "-n", harness.NAMESPACE, "-l", f"kubernetes-gang/place={place.place()}"
        )


# A runtime class that no node has, two priorities, and a quota that admits no pod of the first.
CLUSTER_OBJECTS = (
    {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "missing"},
        "handler": "missing",
    },
    *(
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": value,
        }
        for name, value in (("counted", 1), ("urgent", 1000))
    ),
    {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {
            "hard": {"pods": "0"},
            "scopeSelector": {
                "matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["counted"]}]
            },
        },
    },
)


def _workflows() -> dict[str, harness.Workdir]:
    """Return the working directories: `many` with all that fails in the pods, one for each other mistake."""
    one = 'rule one:\n    output: "one.txt"\n    shell: "sleep 100"\n'
    gpus = one.replace("    shell", "    resources: gpus=8\n    shell")
    minute = one.replace("    shell", "    resources: gpus=8, runtime=1\n    shell").replace("100", "1")
    limited = {"resources": {"limits": {"ephemeral-storage": "20M"}}}
    secret = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "x"}}}
    places = {
        "many": harness.Workdir("failures", snakefile(FAILING), **limited),
        "secret": harness.Workdir("no-secret", one, env=[secret]),
        "mount": harness.Workdir("no-mount", one),
        "sandbox": harness.Workdir("no-sandbox", one),
        "volume": harness.Workdir("other-volume", one),
        "account": harness.Workdir("no-account", one),
        "quota": harness.Workdir("quota", one),
        "claim": harness.Workdir("no-claim", one),
        "preempted": harness.Workdir("preempted", gpus),
        "urgent": harness.Workdir("urgent", minute),
    }
    _edit(places["mount"], volumes=[{"name": "x", "configMap": {"name": "absent"}}])
    absent = {"name": "x", "persistentVolumeClaim": {"claimName": "absent"}}
    _edit(places["claim"], volumes=[absent])
    _edit(places["sandbox"], runtimeClassName="missing")
    _edit(places["account"], serviceAccountName="absent")
    _edit(places["quota"], priorityClassName="counted")
    return places


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


REQUESTED = r"1 x \(0 GPUs, 100m CPUs, 1000 MB\)"
ONCE = r" It is not tried again \(attempt 1 of 1\)\."
NOBODYS = ONCE + r" Start Snakemake again, or raise retries\."
# What happened, the evidence, what to do, whether it is tried again.
SENTENCES = {
    "code": r"pod code-\S+ ended with exit code 3 \(ValueError: too few rows\): see its log\. It is tried again \(attempt 2 of 2\)\.",
    "memory": r"pod memory-\S+ was killed because it used more memory than its limit of 60M \(OOMKilled, exit code 137\): raise mem_mb, or lower what the rule keeps in memory\." + ONCE,
    "deadline": r"the gang ran longer than its resource runtime allows \(.*deadline.*\): raise runtime; a training resumes from its last checkpoint\." + ONCE,
    "nan": r"training produced a number that is not finite in pod nan-\S+, exit code 1 \(rlhf\.errors\.DivergenceError: the loss is nan at step 3: the training stops here; [^)]+\): lower the learning rate, or train in bf16 or fp32\." + ONCE,
    "peer": r"processes timed out while waiting for each other in pod peer-\S+, .* \(.+\): find the rank that stopped first, and check the network between nodes \(NCCL_DEBUG=INFO\)\." + ONCE,
    "image": r"pod image-\S+ cannot get its image registry\.invalid/none:1 \((ErrImagePull|ImagePullBackOff): .+\): check the name, the registry and imagePullSecrets\." + ONCE,
    "name": r"pod name-\S+ cannot get its image \S+ \(InvalidImageName: .+\): check the name, the registry and imagePullSecrets\." + ONCE,
    "unschedulable": r"no node can take pod unschedulable-\S+; the gang requests 1 x \(99 GPUs, 100m CPUs, 1000 MB\) \(0/2 nodes are available: .*2 Insufficient nvidia\.com/gpu.*\): wait for nodes to become free, or request less\.",
    "deleted": r"pod deleted-\S+ was deleted while it ran: ask who deleted it; nothing in the rule is wrong\." + NOBODYS,
    "drained": r"pod drained-\S+ was evicted, as when a node is drained \(.*[Ee]vict.*\): nothing in the rule is wrong\." + NOBODYS,
    "disk": r"pod disk-\S+ was evicted by its node \(.*ephemeral.*20M.*\): check whether the node ran short, or the pod used more than it requested\." + NOBODYS,
    "rank": r"pod rank-\S+-1-\S+ ended with exit code 5 \(last words of rank 1\): see its log\." + ONCE,
    "half": r"only 2 of 3 pods started within 2\d s \(no node can take pod half-\S+; the gang requests 3 x \(0 GPUs, 1100m CPUs, 1000 MB\) \(0/2 nodes are available: 2 Insufficient cpu.*\): use a queue, which starts all pods or none\." + NOBODYS,
    "killed": r"pod killed-\S+ ended with exit code 137 \(SIGKILL\)(?! \(OOM).*: see its log\." + ONCE,
}  # fmt: skip


ELSEWHERE = {
    "secret": r'pod one-\S+ cannot be configured \(CreateContainerConfigError: secret "absent" not found\): create the Secret or ConfigMap that it names, or correct the pod template\.' + ONCE,
    "mount": r'a volume cannot be mounted \(FailedMount: MountVolume.SetUp failed for volume "x" : configmap "absent" not found\): check the claim, the Secret or the path that it names\.' + ONCE,
    "sandbox": r"the node cannot set up the pod \(FailedCreatePodSandBox.+\): check the node's network and runtime class\." + NOBODYS,
    "account": r"the cluster refuses this gang's pods \(Error creating: pods \"one-.+\): correct the pod template, or ask the cluster's administrator\." + ONCE,
    "volume": r"pod one-\S+ stopped before its command was done \(kubernetes-gang: this pod does not see the controller's working directory: .+\): mount the controller's volume at the same path\." + ONCE,
    "claim": r'a claim of pod one-\S+ does not exist or has no volume \(0/2 nodes are available: persistentvolumeclaim "absent" not found.*\): create the claim in the gang\'s namespace, or correct its name in the option volumes or the pod template\.' + ONCE,
    "quota": r"the namespace's quota leaves no room for this gang, which requests " + REQUESTED + r" \(.*exceeded quota: none.*\): it starts when others have ended; request less, or a larger quota\.",
    "preempted": r"pod one-\S+ was preempted by pods of a higher priority \(.*preempting.*\): raise the priority, or use a queue with a quota of its own\." + NOBODYS,
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_a_failure_is_reported_in_a_sentence(said, name):
    assert re.search(SENTENCES[name], said["many"]), said["many"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_pod_that_cannot_run_here_is_reported_in_a_sentence(said, name):
    assert re.search(ELSEWHERE[name], said[name]), said[name]


def test_the_sentence_stands_once_more_below_everything_that_snakemake_prints(said):
    end = said["secret"][said["secret"].rindex("Error in rule one") :]
    assert re.search(r"^kubernetes-gang: one failed: " + ELSEWHERE["secret"] + "$", end, re.M), end


@pytest.mark.parametrize(("rule", "ranks"), [("rank", 2), ("first", 3)])
def test_after_a_failure_every_ranks_last_words_are_on_the_volume(said, rule, ranks):
    """Also those of ranks whose pods the Job has deleted because another had failed."""
    state = harness.volume() / "failures" / ".snakemake/auxiliary/kubernetes-gang"
    for rank in range(ranks):
        [stored] = state.glob(f"{rule}-*/*.rank-{rank}.log")
        assert f"last words of rank {rank}" in stored.read_text()
        assert str(stored) in said["many"], "the error names the files"
    assert "may lack its end" not in said["many"]
