"""Gangs from beginning to end on a real cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

import harness
from harness import CLAIM, IMAGE, wait_until

ONE_AND_TWO = r"""
rule all:
    input: "one.txt", "two.txt"
rule one:
    output: "one.txt"
    log: "one.log"
    benchmark: "one.tsv"
    threads: 2
    shell: "for i in $(seq 1 300); do echo line $i; done; [ $$ -gt 0 ]; echo $OMP_NUM_THREADS $(id -u) > {output}"
rule two:
    output: directory("two")
    resources: nodes=2
    shell: "mkdir -p {output}; getent hosts $MASTER_ADDR > {output}/$NODE_RANK; hostname; sleep 2"
rule both:
    input: "two"
    output: "two.txt"
    shell: "cat {input}/0 {input}/1 > {output}"
"""


def test_a_pod_and_a_gang_of_two(workdir):
    place = workdir(ONE_AND_TWO)
    code, said = place.run()
    assert code == 0, said
    assert (place.path / "one.txt").read_text().split() == ["2", str(harness.OWNER)]
    rank0, rank1 = (place.path / "two.txt").read_text().splitlines()
    assert rank0.split()[0] == rank1.split()[0], "both ranks find the same address for rank 0"
    lines = (place.path / "one.log").read_text().splitlines()
    assert lines == [f"line {i}" for i in range(1, 301)], "the rule's log, without loss or duplication"
    assert said.count("line 300\n") == 1
    assert float((place.path / "one.tsv").read_text().splitlines()[1].split()[0]) >= 0
    assert not place.objects("jobs,services,pods"), "nothing is left behind"
    stored = list(place.path.glob(".snakemake/auxiliary/kubernetes-gang/two-*/*.rank-*.log"))
    assert len(stored) == 2, "every rank's log is on the volume"


def test_a_container_that_stays_does_not_keep_its_gang(workdir):
    """A proxy or a log agent beside the command: the cluster never ends its pod."""
    rule = "rule {0}:\n    output: '{0}.txt'\n    resources: nodes=2\n    shell: '{1}'\n"
    place = workdir(
        "rule all:\n    input: 'good.txt', 'bad.txt'\n"
        + rule.format("good", "echo $NODE_RANK >> {output}")
        + rule.format("bad", "[ $NODE_RANK = 0 ] && sleep 600; echo no such row >&2; exit 7")
    )
    template = yaml.safe_load(place.template.read_text())
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    agent = {"name": "agent", "image": IMAGE, "command": ["sleep", "3600"], "securityContext": security}
    template["spec"]["containers"].append(agent)
    place.template.write_text(yaml.safe_dump(template))
    code, said = place.run("--keep-going", limit_s=240)
    assert code != 0
    assert sorted((place.path / "good.txt").read_text().split()) == ["0", "1"]
    assert "exit code 7" in said
    assert "no such row" in said
    wait_until("the pods are gone", lambda: not place.objects("jobs,services,pods"), 60)


def test_rbac_yaml_alone_is_all_that_jobs_need(workdir):
    more = str(harness.REPO / "k8s" / "base" / "rbac-backends.yaml")
    harness.kubectl("delete", "-n", harness.NAMESPACE, "-f", more)
    try:
        rule = "rule {0}:\n    output: '{0}.txt'\n    resources: nodes={1}\n    shell: '{2}'\n"
        place = workdir(
            "rule all:\n    input: 'one.txt', 'two.txt'\n"
            + rule.format("one", 1, "touch {output}")
            + rule.format("two", 2, "sleep 1; echo done > {output}")
        )
        code, said = place.run()
        assert code == 0, said
        assert not place.objects("jobs,services,pods")
    finally:
        harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", more)


def test_secrets_go_by_reference_and_shared_memory_has_its_size(workdir):
    place = workdir(
        'envvars: "GREETING"\nrule one:\n    output: "one.txt"\n    resources: mem_mb=400, shm_mb=100\n'
        '    shell: "echo $GREETING > {output}; df -BM --output=size /dev/shm | tail -1 >> {output}; sleep 3"\n'
    )
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "greetings"},
        "stringData": {"GREETING": "hush-7311"},
    }
    harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given=secret)
    process = place.start("--kubernetes-gang-env-secret", "greetings", GREETING="not-this")
    wait_until("it runs", lambda: place.objects("pods"))
    manifests = str(place.objects("pods,jobs"))
    assert process.wait(60) == 0, place.said()
    assert (place.path / "one.txt").read_text().split() == ["hush-7311", "96M"], "100 MB are 96 MiB"
    assert "hush-7311" not in manifests + place.said()
    assert "not-this" not in manifests + place.said()


def test_declared_variables_need_a_secret(workdir):
    place = workdir('envvars: "GREETING"\nrule one:\n    output: "one.txt"\n    shell: "true"\n')
    code, said = place.run(GREETING="x")
    assert code != 0
    assert "their values are not written into manifests" in said


def test_snakemakes_own_suite_for_executors(workdir):
    place = workdir("")
    environment = {
        **place.environment(),
        "SUITE_IMAGE": IMAGE,
        "SUITE_VOLUME": f"{CLAIM}:{harness.volume()}",
        "SUITE_TEMPLATE": str(place.template),
    }
    place.write("test_suite.py", Path(__file__).with_name("snakemake_suite.py").read_text())
    options = ["-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={place.path}/suite", "-q"]
    command = [*harness.as_owner(), sys.executable, "-m", "pytest", *options, "test_suite.py"]
    run = subprocess.run(
        command, env=environment, cwd=place.path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
