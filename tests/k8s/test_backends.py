"""All four backends run a gang of two to its end, fail it, and restart it; queues hold gangs back."""

from __future__ import annotations

import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from deepspeedjob_controller import Controller
from test_life import counting, runs, steps

import harness
from harness import wait_until
from snakemake_executor_plugin_kubernetes_gang.spec import gang_name

GOLDEN = harness.REPO / "tests" / "k8s" / "golden"
# Fails at its first attempt on request; a rule with GPUs goes to the backend.
GANG = r"""
rule gang:
    output: directory("out")
    resources: nodes=2, gpus=1
    retries: {retries}
    shell:
        'r=${{{{NODE_RANK:-$RANK}}}}; echo rank $r as $(id -u) in ${{{{POD:-?}}}}; echo $r >> ranks;'
        ' command -v snakemake > /dev/null; : $OMP_NUM_THREADS;'
        ' [ $r != 1 -o {retries} = 0 -o -e failed ] || {{{{ touch failed; exit 9; }}}};'
        ' sleep 2; mkdir -p {{output}}; echo done > {{output}}/$r'
"""
# A variable whose value does not stand in the manifest, like one from a Secret.
POD = [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
BACKENDS = ("job", "jobset", "trainjob", "deepspeedjob")
CRDS = (
    "jobsets.jobset.x-k8s.io",
    "trainjobs.trainer.kubeflow.org",
    "clusterqueues.kueue.x-k8s.io",
    "deepspeedjobs.batch.tensorstack.dev",
)


@pytest.fixture(scope="module", autouse=True)
def controllers():
    if harness.OURS:
        harness.cluster("controllers", "jobset", "trainer", "kueue")
    elif missing := [crd for crd in CRDS if not harness.kubectl("get", "crd", crd, check=False)]:
        pytest.skip(f"not installed in the cluster that KUBECONFIG names: {', '.join(missing)}")
    stand_in = Controller()
    stand_in.start()
    yield stand_in
    stand_in.stop()


def queue(gpus: int) -> None:
    """A Kueue queue with a real quota."""
    resources = [
        {"name": "cpu", "nominalQuota": 8},
        {"name": "memory", "nominalQuota": "16Gi"},
        {"name": "nvidia.com/gpu", "nominalQuota": gpus},
    ]
    group = {
        "coveredResources": [r["name"] for r in resources],
        "flavors": [{"name": "default", "resources": resources}],
    }
    preemption = {"withinClusterQueue": "LowerPriority"}
    for kind, name, spec in (
        ("ResourceFlavor", "default", {}),
        (
            "ClusterQueue",
            "gpus",
            {"namespaceSelector": {}, "resourceGroups": [group], "preemption": preemption},
        ),
        ("LocalQueue", "training", {"clusterQueue": "gpus"}),
    ):
        metadata = {"name": name, **({"namespace": harness.NAMESPACE} if kind == "LocalQueue" else {})}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": kind, "metadata": metadata, "spec": spec}
        wait_until(
            f"{kind} is taken", lambda body=body: harness.kubectl("apply", "-f", "-", given=body, check=False)
        )


@pytest.fixture(scope="module")
def gangs(controllers):
    """For each backend a gang that ends well and one that is restarted: directory, exit code, output."""

    def one(case: tuple[str, int]):
        backend, retries = case
        place = harness.Workdir(f"{backend}-{retries}", GANG.format(retries=retries), env=POD)
        return case, (place, *place.run("--kubernetes-gang-backend", backend))

    with ThreadPoolExecutor(3) as pool:
        return dict(pool.map(one, [(backend, retries) for backend in BACKENDS for retries in (0, 1)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gang_ends_well(gangs, backend):
    place, code, said = gangs[backend, 0]
    assert code == 0, said
    assert sorted((place.path / "ranks").read_text().split()) == ["0", "1"]
    assert f"rank 0 as {harness.OWNER} in gang-" in said, (
        "not root and with the pod's variables, under each backend"
    )
    for path in (place.path / "out").iterdir():
        assert path.stat().st_uid == harness.OWNER
    everything = "pods,jobs,services,jobsets,trainjobs,trainingruntimes,deepspeedjobs"
    wait_until("nothing is left", lambda: not place.objects(everything))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gang_fails_and_is_restarted(gangs, backend):
    place, code, said = gangs[backend, 1]
    assert code == 0, said
    assert "ended with exit code 9" in said
    assert sorted((place.path / "ranks").read_text().split()) == ["0", "0", "1", "1"]


def test_the_volumes_owner_can_delete_what_a_deepspeedjob_made(gangs):
    """What a DeepSpeedJob's pods, which are root, have written, the volume's owner can delete."""
    place, _, _ = gangs["deepspeedjob", 0]
    subprocess.run(
        [*harness.as_owner(), "rm", "-r", str(place.path / "out"), str(place.path / "ranks")], check=True
    )
    assert not (place.path / "out").exists()


@pytest.mark.parametrize("backend", ["job", "trainjob"])
def test_a_helper_that_was_left_behind_is_replaced(workdir, controllers, backend):
    """A controller that died between two requests leaves a Service or a runtime without its gang."""
    place = workdir(GANG.format(retries=0))
    name = gang_name("gang", place.place(), ["out"])
    left = next(
        yaml.safe_load_all(
            (GOLDEN / ("trainjob.yaml" if backend == "trainjob" else "job-gang-kueue.yaml")).read_text()
        )
    )
    left["metadata"]["name"] = name
    left["metadata"]["labels"]["left"] = "yes"
    harness.kubectl("create", "-n", harness.NAMESPACE, "-f", "-", given=left)
    code, said = place.run("--kubernetes-gang-backend", backend)
    assert code == 0, said
    assert not harness.get(f"{left['kind'].lower()}s", "-l", "left=yes")


def test_another_backend_ends_the_gang_of_the_first(workdir, controllers):
    text = GANG.format(retries=0).replace("sleep 2", "sleep 60")
    place = workdir(text)
    process = place.start("--kubernetes-gang-backend", "jobset")
    wait_until("it runs", lambda: (place.path / "ranks").exists())
    harness.kill(process)
    place.unlock()
    (place.path / "Snakefile").write_text(text.replace("sleep 60", "sleep 1"))
    code, said = place.run("--kubernetes-gang-backend", "job")
    assert code == 0, said
    assert "is replaced: it is a JobSet, created with another backend" in said
    assert not place.objects("jobsets")


def test_the_older_spelling_of_deepspeedjob(workdir, controllers):
    controllers.spelling = "old"
    place = workdir(GANG.format(retries=1))
    code, said = place.run("--kubernetes-gang-backend", "deepspeedjob")
    controllers.spelling = "new"
    assert code == 0, said
    assert "ended with exit code 9" in said


@pytest.mark.parametrize("backend", ["job", "jobset"])
def test_a_second_gang_waits_in_kueues_queue(workdir, backend):
    queue(gpus=2)
    text = GANG.format(retries=0)
    second = text.replace("rule gang", "rule other").replace('"out"', '"out2"').replace("gang", "other")
    place = workdir('rule all:\n    input: "out", "out2"\n' + text + second, name=f"kueue-{backend}")
    code, said = place.run(
        "--kubernetes-gang-backend",
        backend,
        "--kubernetes-gang-queue-system",
        "kueue",
        "--set-resources",
        "gang:queue=training",
        "other:queue=training",
    )
    assert code == 0, said
    assert "it waits in the queue training" in said
    assert "insufficient" in said
    first, last = [
        sorted(p.stat()[stat.ST_MTIME] for p in (place.path / d).iterdir()) for d in ("out", "out2")
    ]
    assert first[-1] < last[0] or last[-1] < first[0], "one after the other"


@pytest.mark.parametrize("backend", ["job", "jobset"])
def test_a_gang_that_kueue_takes_back_waits_and_goes_on_by_itself(workdir, backend):
    """A more important gang gets its place; no retry is spent on it."""
    queue(gpus=2)
    for name, value in (("low", 1), ("high", 1000)):
        body = {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "WorkloadPriorityClass",
            "metadata": {"name": name},
            "value": value,
        }
        harness.kubectl("apply", "-f", "-", given=body)
    text = counting(12, nodes=2).replace("nodes=2", "nodes=2, gpus=1, queue='training', priority='low'")
    options = ("--kubernetes-gang-backend", backend, "--kubernetes-gang-queue-system", "kueue")
    low = workdir(text, name=f"low-{backend}")
    high = workdir(text.replace("'low'", "'high'").replace("-lt 12", "-lt 4"), name=f"high-{backend}")
    first = low.start(*options)
    wait_until("it has a checkpoint", lambda: steps(low) >= 3)
    code, said = high.run(*options)
    assert code == 0, said
    assert first.wait(120) == 0, low.said()
    assert "it was returned to the queue training" in low.said()
    assert "reempted to accommodate a workload" in low.said()
    assert low.said().count(" step 2\n") == 1, "it went on from its checkpoint"
    assert runs(low) == 2


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_golden_manifests_pass_the_api_servers_dry_run(path):
    bodies = list(yaml.safe_load_all(path.read_text()))
    if bodies[-1]["kind"] == "TrainJob":  # its webhook wants the runtime to be there
        harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given=bodies[0])
        bodies = bodies[1:]
    for body in bodies:
        harness.kubectl(
            "create", "--dry-run=server", "--validate=strict", "-n", harness.NAMESPACE, "-f", "-", given=body
        )
    harness.kubectl("delete", "trainingruntimes", "--all", "-n", harness.NAMESPACE)
