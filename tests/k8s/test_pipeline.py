"""The scenario tiny in gangs of two pods, from outside and from inside the cluster, against a local run.

Its models, data, batches and lengths are tiny's own. Its steps are fewer (FEWER), and that is all: three
whole runs would take longer than the rest of this layer, and what is compared is equality, not learning.
K8S_FULL=1 takes all steps.
"""

from __future__ import annotations

import hashlib
import os
import shutil

import dockerfile
import pytest
import yaml

import harness

TARGET = "results/tiny/rlhf/actor"
FULL = os.environ.get("K8S_FULL") == "1"
# Enough to move the weights of all three trainings.
FEWER = {
    "sft": {"steps": 60, "eval_rows": 128},
    "reward": {"epochs": None, "steps": 30, "eval_rows": 128},
    "rlhf": {"iterations": 5, "reward_samples": 64},
}
RUN = {"processes": 2, "zero_stage": 2, "threads": 1, "micro_batch_size": 16}


def tiny(nodes: int) -> dict:
    run = {"run": {**RUN, "nodes": nodes}}
    return {
        "scenarios": {"tiny": {stage: {**({} if FULL else fewer), **run} for stage, fewer in FEWER.items()}}
    }


class Pipeline(harness.Workdir):
    """The repository's Snakefile on a directory of the volume."""

    def __init__(self, name: str, nodes: int):
        super().__init__(name)
        self.write("overrides.yaml", yaml.safe_dump({"pvc": str(self.path), **tiny(nodes)}))
        self.cwd = harness.REPO

    def local(self) -> list[str]:
        options = [
            "--cores",
            "2",
            "--workflow-profile",
            "none",
            "--rerun-triggers",
            "input",
            "--retries",
            "2",
            "--nocolor",
        ]
        return [
            *harness.as_owner(),
            harness.sys.executable,
            "-m",
            "snakemake",
            TARGET,
            *options,
            *self.config(),
        ]

    def config(self) -> list[str]:
        return ["--configfile", str(self.path / "overrides.yaml")]

    def profile(self) -> dict:
        """profiles/kubernetes, with the test's mounts."""
        given = yaml.safe_load((harness.REPO / "profiles" / "kubernetes" / "config.yaml").read_text())
        del given["config"]
        return given | {
            "kubernetes-gang-volumes": [f"{harness.CLAIM}:{harness.volume()}"],
            "kubernetes-gang-pod-template": [str(self.template)],
            "configfile": [str(self.path / "overrides.yaml")],
            "seconds-between-status-checks": 1,
        }

    def weights(self) -> str:
        return hashlib.sha256((self.path / TARGET / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def local():
    place = Pipeline("pipeline-local", nodes=1)
    run = harness.subprocess.run(
        place.local(), cwd=place.cwd, env=place.environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return place


def test_gangs_of_two_make_what_two_local_processes_make(local):
    place = Pipeline("pipeline-outside", nodes=2)
    options = ("--rerun-triggers", "input", "--retries", "2")
    code, said = place.run(TARGET, *place.config(), *options, limit_s=3000 if FULL else 400)
    assert code == 0, said
    assert place.weights() == local.weights()
    assert not place.objects("jobs,services,pods")
    assert (place.path / "benchmarks").is_dir()


def test_the_driver_pod_makes_the_same_from_inside(local):
    """`snakemake TARGET` in the Deployment of k8s/base, with its account; only image and mounts are the test's."""
    place = Pipeline("pipeline-inside", nodes=2)
    for made in ("models", "datasets", "store/data"):  # those single pods have had their test
        shutil.copytree(local.path / made, place.path / made, symlinks=True)
    profile = place.path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text(yaml.safe_dump(place.profile()))
    place.give()
    harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given=driver(place, profile))
    try:
        harness.kubectl("rollout", "status", "deploy/snakemake", "-n", harness.NAMESPACE, "--timeout=90s")
        shell = f"cd {harness.REPO} && snakemake {TARGET} 2>&1"
        said = harness.kubectl(
            "exec", "deploy/snakemake", "-n", harness.NAMESPACE, "--", "bash", "-c", shell, check=False
        )
        assert (place.path / TARGET).exists(), said
        assert "Provided remote nodes" in said
        assert place.weights() == local.weights()
    finally:
        harness.kubectl("delete", "deploy", "snakemake", "-n", harness.NAMESPACE)


def driver(place: Pipeline, profile) -> dict:
    found = yaml.safe_load_all(harness.kubectl("kustomize", str(harness.REPO / "k8s" / "base")))
    body = next(thing for thing in found if thing["kind"] == "Deployment")
    spec, mine = body["spec"]["template"]["spec"], yaml.safe_load(place.template.read_text())["spec"]
    container = spec["containers"][0]
    container["image"] = harness.IMAGE
    container["volumeMounts"][0]["mountPath"] = str(harness.volume())
    container["volumeMounts"] += mine["containers"][0]["volumeMounts"]
    values = {
        # The image is not ours: its variables are, and its code is where the repository is.
        "PYTHONPATH": dockerfile.environment()["PYTHONPATH"].replace("/opt/rlhf", str(harness.REPO)),
        "SNAKEMAKE_PROFILE": str(profile),
        "SNAKEMAKE_KUBERNETES_GANG_IMAGE": harness.IMAGE,
    }
    mine_env = [*mine["containers"][0]["env"], *({"name": k, "value": v} for k, v in values.items())]
    container["env"] = [e for e in container["env"] if e["name"] not in values] + mine_env
    spec["volumes"] += mine["volumes"]
    return body
