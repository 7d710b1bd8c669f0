from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_kubernetes_gang import jobs, spec
from snakemake_executor_plugin_kubernetes_gang.evidence import Evidence
from snakemake_executor_plugin_kubernetes_gang.settings import ExecutorSettings


@given(st.text(max_size=80), st.lists(st.text(max_size=20), max_size=3))
def test_names_are_dns_labels_with_room_for_the_suffixes_of_controllers(rule, outputs):
    name = spec.gang_name(rule, "here", outputs)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-gang-0-4095") <= 63


def test_names_depend_only_on_working_directory_rule_and_outputs():
    name = spec.gang_name("sft", "here", ["a", "b"])
    assert name == spec.gang_name("sft", "here", ["b", "a"])
    others = [
        spec.gang_name("sft", "there", ["a", "b"]),
        spec.gang_name("sft", "here", ["a"]),
        spec.gang_name("rlhf", "here", ["a", "b"]),
    ]
    assert len({name, *others}) == 4


@pytest.mark.parametrize("text", ["claim", ":/path", "claim:path", ""])
def test_a_volume_needs_a_claim_and_an_absolute_path(text):
    with pytest.raises(spec.SpecError, match="claim:/path"):
        spec.parse_volume(text)


def test_volumes():
    assert spec.parse_volume("data:/mnt/x/:a/b") == spec.Volume("data", "/mnt/x", "a/b")


@pytest.mark.parametrize(
    "changes",
    [{"nodes": 0}, {"gpus": -1}, {"memory_mb": 0}, {"cpu": "many"}, {"memory_mb": 100, "shm_mb": 100}],
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(spec.SpecError, match=r"Correct the rule|mem_mb"):
        spec.GangSpec(
            name="x",
            command="",
            workdir="",
            project="",
            image="",
            state_dir="",
            token="",
            uid=1,
            gid=1,
            **changes,
        )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"backend": "pods"}, "backend"),
        ({"on_exit": "stay"}, "on-exit"),
        ({"queue_system": "slurm"}, "queue-system"),
        ({"start_timeout": 0}, "start-timeout"),
        ({"volumes": ["x"]}, "volumes"),
    ],
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(WorkflowError, match=word):
        ExecutorSettings(**options)


@pytest.mark.parametrize(
    "value",
    ["http://me:secret@proxy.example:3128", "me:secret@proxy.example:3128", "http://a https://me:secret@b/x"],
)
def test_a_proxys_password_does_not_go_into_manifests(monkeypatch, value):
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(spec.SpecError, match="HTTPS_PROXY holds a password") as error:
        jobs._environment(ExecutorSettings())
    assert "secret@" not in str(error.value)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"])
def test_a_variable_that_is_a_secret_by_its_name_is_not_passed(name):
    with pytest.raises(WorkflowError, match=f"pass-env {name}: .*secretKeyRef"):
        ExecutorSettings(pass_env=["HF_ENDPOINT", name])


def test_what_only_looks_like_a_secret_is_passed(monkeypatch):
    values = {"TOKENIZERS_PARALLELISM": "true", "MAIL": "me@example.org", "HF_ENDPOINT": "https://hub/a@b"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    env = jobs._environment(ExecutorSettings(pass_env=list(values)))
    assert env.items() >= values.items()


@pytest.mark.parametrize(
    ("threads", "nodes", "cpu", "expected"),
    [(4, 2, None, "2"), (2, 1, "64", "64"), (2, 1, "100m", "2"), (2, 1, "2500m", "2"), (1, 1, 0.5, "1")],
)
def test_a_pod_has_threads_for_its_cpus_although_snakemake_has_reduced_those_of_the_rule(
    threads, nodes, cpu, expected
):
    """Snakemake reduces `threads` to the CPUs of its own machine."""
    resources = {} if cpu is None else {"cpu": cpu}
    assert jobs.thread_variables(threads, nodes, resources)["OMP_NUM_THREADS"] == expected


def test_libraries_read_the_variables_of_threads():
    """Apple's Accelerate, which reads VECLIB_MAXIMUM_THREADS, is in no image."""
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "GOTO")
    assert jobs.thread_variables(1, 1, {}).keys() == {f"{name}_NUM_THREADS" for name in libraries}


def test_proxies_and_named_variables_reach_pods(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/volume/authority.pem")
    monkeypatch.setenv("NO_PROXY", "localhost,.cluster.local")
    monkeypatch.setenv("MIRROR", "https://mirror.example/x")
    env = jobs._environment(ExecutorSettings(pass_env=["MIRROR"]))
    assert env["NO_PROXY"] == "localhost,.cluster.local"
    assert env["MIRROR"] == "https://mirror.example/x"
    assert env["SSL_CERT_FILE"] == "/volume/authority.pem"


def test_a_user_that_the_image_does_not_have_gets_a_name(monkeypatch):
    """Torch, and Snakemake in a pod, need one."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in jobs._environment(ExecutorSettings()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert getpass.getuser() == str(os.getuid())


def test_a_queue_needs_a_system():
    with pytest.raises(spec.SpecError, match="queue-system"):
        jobs._queue({"queue": "training"}, ExecutorSettings())


def test_the_fingerprint_changes_with_everything_that_changes_a_result(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("x")
    job = SimpleNamespace(
        is_group=lambda: False, is_shell=True, input=[str(path)], rule=SimpleNamespace(name="sft")
    )
    mark = jobs.fingerprint(job, "run", "image", 1, 0)
    assert mark == jobs.fingerprint(job, "run", "image", 1, 0)
    others = [jobs.fingerprint(job, "other", "image", 1, 0), jobs.fingerprint(job, "run", "image", 2, 0)]
    os.utime(path, ns=(1, 1))
    assert len({mark, *others, jobs.fingerprint(job, "run", "image", 1, 0)}) == 4


def test_the_plugin_does_not_depend_on_what_it_runs():
    folder = Path(jobs.__file__).parent
    pattern = re.compile(r"^\s*(from|import) (rlhf|torch|deepspeed)", re.MULTILINE)
    assert not [path.name for path in folder.glob("*.py") if pattern.search(path.read_text())]


def test_waiting_gangs_share_one_request():
    answers = {
        "Event": [
            {"involvedObject": {"name": "sft-0123456789-0-abcde"}, "lastTimestamp": "2026-01-02"},
            {"involvedObject": {"name": "sft-9876543210-0-abcde"}, "lastTimestamp": "2026-01-02"},
        ],
        "Workload": [{"metadata": {"labels": {"kueue.x-k8s.io/job-uid": "u"}}}],
    }
    requests = []

    def once(_, path, __):
        requests.append(path)
        return {"items": answers[path]}

    evidence = Evidence(SimpleNamespace(path=str, once=once), print)
    for _ in range(100):
        assert len(evidence.warnings("sft-0123456789", "2026-01-01")) == 1
        assert not evidence.warnings("sft-0123456789", "2026-01-03"), "of an earlier gang of this name"
        assert len(evidence.workloads("u")) == 1
    assert requests == ["Event", "Workload"]
    evidence.refresh()
    evidence.workloads("u")
    assert requests == ["Event", "Workload", "Workload"]
