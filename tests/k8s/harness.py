"""A real cluster for tests, and Snakemake on it as uid 1000 with the rights of k8s/base and no more.

The script `cluster` in the folder K8S_TEST_CLUSTER starts one. With K8S_CLUSTER_MAY_BE_USED=1 it is the one that
KUBECONFIG names, and its claim K8S_VOLUME (claim:/path) is at that path here too. There need be no registry: pods
get this machine's Python by hostPath mounts, unless K8S_IMAGE names an image that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from snakemake_executor_plugin_kubernetes_gang import spec

REPO = Path(__file__).resolve().parents[2]
NAMESPACE = "rlhf"
OURS = os.environ.get("K8S_CLUSTER_MAY_BE_USED") != "1"  # started by the tests, with root on its nodes
CLAIM, _, MOUNTED_AT = os.environ.get("K8S_VOLUME", "rlhf:").partition(":")
IMAGE = os.environ.get("K8S_IMAGE", "localhost/base:1")
OWNER = os.getuid() or 1000
PACKAGES = ("containerd", "runc", "iptables", "ip", "openssl", "curl", "xz", "setpriv")


def script() -> Path:
    """Return the program that starts and stops the test cluster."""
    return Path(os.environ["K8S_TEST_CLUSTER"], "cluster").resolve()


def why_not() -> str:
    """Return why there is no cluster to be had here; empty if there is."""
    if not OURS:
        return why_not_theirs()
    if not os.environ.get("K8S_TEST_CLUSTER"):
        return (
            "no cluster: set K8S_TEST_CLUSTER to the folder of a script `cluster` that starts one, or"
            " K8S_CLUSTER_MAY_BE_USED=1 and KUBECONFIG for an existing one (docs/kubernetes.md)"
        )
    if not script().is_file():
        return (
            f"no script {script()}: set K8S_TEST_CLUSTER to the folder of a script `cluster` that starts one"
        )
    if os.getuid() != 0:
        return "the test cluster needs root"
    missing = [name for name in PACKAGES if not shutil.which(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def why_not_theirs() -> str:
    """The same for a cluster that KUBECONFIG names."""
    if not kubeconfig().is_file():
        return "K8S_CLUSTER_MAY_BE_USED is set, but KUBECONFIG names no file: set it to the cluster's"
    if not shutil.which(kubectl_command()[0]):
        return "kubectl is not installed"
    if not kubectl("get", "pvc", CLAIM, "-n", NAMESPACE, check=False):
        return f"there is no claim {CLAIM} in the namespace {NAMESPACE}, or no answer: make it, or set K8S_VOLUME=claim:/path"
    return (
        ""
        if volume().is_dir()
        else f"the claim {CLAIM} is not at {volume()} here: set K8S_VOLUME=claim:/path"
    )


def needs_nodes(what: str) -> None:
    """Skip what only root on the nodes can do, where they are not ours."""
    if not OURS:
        pytest.skip(f"{what}: needs root on the nodes of the cluster that KUBECONFIG names")


def directory() -> Path:
    return Path(os.environ.get("CLUSTER_DIR", "/tmp/k8stest"))


def cluster(*arguments: str, check: bool = True) -> str:
    """Run the cluster's script; return what it prints."""
    environment = {
        **os.environ,
        "NODES": "2",
        "GPUS": "8",
        "PVC_DIR": str(volume()),
        "CLUSTER_DIR": str(directory()),
    }
    run = subprocess.run(
        [str(script()), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=check,
    )
    return run.stdout


def audit_log() -> Path:
    return directory() / "audit.log"


def start_cluster() -> None:
    """Start the cluster; its API server notes what the ServiceAccount of k8s/base asks for."""
    directory().mkdir(parents=True, exist_ok=True)
    user = f"system:serviceaccount:{NAMESPACE}:snakemake"
    rules = [{"level": "Metadata", "users": [user], "omitStages": ["RequestReceived"]}, {"level": "None"}]
    policy = directory() / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
    os.environ["APISERVER_EXTRA"] = f"--audit-policy-file={policy} --audit-log-path={audit_log()}"
    cluster("up")


@contextmanager
def running():
    """A running cluster with the rights of k8s/base; K8S_TEST_KEEP=1 leaves it running."""
    if OURS:
        start_cluster()
        os.chown(volume(), OWNER, OWNER)
    for name in ("rbac.yaml", "rbac-backends.yaml"):
        kubectl("apply", "-n", NAMESPACE, "-f", str(REPO / "k8s" / "base" / name))
    try:
        yield
    finally:
        if OURS and not os.environ.get("K8S_TEST_KEEP"):
            cluster("down")


def volume() -> Path:
    return Path(MOUNTED_AT) if MOUNTED_AT else directory() / "pvc"


def kubeconfig() -> Path:
    """An administrator's credentials."""
    return directory() / "kubeconfig" if OURS else Path(os.environ.get("KUBECONFIG", ""))


def kubectl_command() -> list[str]:
    return [str(directory() / "bin" / "kubernetes"), "kubectl"] if OURS else ["kubectl"]


def kubectl(*arguments: str, given: object = None, check: bool = True) -> str:
    text = None if given is None else json.dumps(given)
    command = [*kubectl_command(), "--kubeconfig", str(kubeconfig()), *arguments]
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if check and run.returncode:
        raise AssertionError(f"kubectl {' '.join(arguments)}: {run.stderr}")
    return run.stdout


def get(kind: str, *arguments: str) -> list[dict]:
    found = json.loads(kubectl("get", kind, "-n", NAMESPACE, "-o", "json", *arguments))
    return found.get("items", [found])


def pods(name: str = "") -> list[dict]:
    return [
        pod for pod in get("pods", "-l", "kubernetes-gang/gang") if pod["metadata"]["name"].startswith(name)
    ]


def wait_until(what: str, condition, limit_s: float = 60.0, every_s: float = 0.3):
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(every_s)
    raise AssertionError(f"not within {limit_s} s: {what}")


def credentials(path: Path) -> None:
    """Write a kubeconfig of the ServiceAccount of k8s/base, readable for the volume's owner."""
    token = kubectl("create", "token", "snakemake", "-n", NAMESPACE, "--duration", "8h").strip()
    admin = json.loads(kubectl("config", "view", "--minify", "--flatten", "-o", "json"))
    admin["users"] = [{"name": "snakemake", "user": {"token": token}}]
    admin["contexts"][0]["context"].update(user="snakemake", namespace=NAMESPACE)
    path.write_text(yaml.safe_dump(admin))
    path.chmod(0o600)
    own(path)


def pod_template(path: Path, **main) -> Path:
    """Write the pod template that brings this machine's Python into pods, where the image has none."""
    venv = Path(sys.prefix)
    # Programs of an environment behind a link name their python by its own path.
    mounted = ["/usr", "/lib", "/lib64", sys.base_prefix, str(venv), str(venv.resolve()), str(REPO)]
    mounted = sorted({p for p in mounted if not any(p != q and Path(p).is_relative_to(q) for q in mounted)})
    mounted = [] if "K8S_IMAGE" in os.environ else mounted
    mounts = [{"name": f"host-{n}", "mountPath": p, "readOnly": True} for n, p in enumerate(mounted)]
    volumes = [{"name": f"host-{n}", "hostPath": {"path": p}} for n, p in enumerate(mounted)]
    env = [{"name": "PATH", "value": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin"}, *main.pop("env", [])]
    container = {
        "name": "main",
        "imagePullPolicy": "IfNotPresent",
        "env": env,
        "volumeMounts": mounts,
        **main,
    }
    path.write_text(
        yaml.safe_dump(
            {"spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 5}}
        )
    )
    return path


def own(path: Path) -> None:
    """Give a file, or all of a directory, to uid 1000; who is not root is the owner."""
    if os.getuid() == 0:
        subprocess.run(["chown", "-R", f"{OWNER}:{OWNER}", str(path)], check=True)


def as_owner() -> list[str]:
    """A command that runs another as uid 1000. It may read what root may: this machine's Python."""
    if os.getuid():
        return []
    caps = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={OWNER}", f"--regid={OWNER}", "--clear-groups", *caps]


class Workdir:
    """A working directory on the volume, with a Snakefile, owned by uid 1000."""

    def __init__(self, name: str, snakefile: str = "", **template):
        self.path = volume() / name
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        (self.path / "Snakefile").write_text(snakefile)
        self.template = pod_template(self.path / "pod.yaml", **template)
        credentials(self.path / "kubeconfig")
        self.give()
        self.log = self.path / "controller.log"
        self.cwd = self.path

    def give(self) -> None:
        own(self.path)

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.write_text(text)
        own(path)
        return path

    def environment(self) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if k in ("LANG", "CLUSTER_DIR", "K8S_TEST_CLUSTER")}
        return {
            **keep,
            "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.path),
            "USER": "trainer",
            "PYTHONPATH": f"{REPO}/k8s:{REPO}/scripts",
            "PYTHONDONTWRITEBYTECODE": "1",
            "KUBECONFIG": str(self.path / "kubeconfig"),
            "XDG_CACHE_HOME": str(self.path / ".cache"),
        }

    def command(self, *arguments: str) -> list[str]:
        options = [
            "--executor",
            "kubernetes-gang",
            "--kubernetes-gang-image",
            IMAGE,
            "--kubernetes-gang-volumes",
            f"{CLAIM}:{volume()}",
            "--kubernetes-gang-pod-template",
            str(self.template),
            "--jobs",
            "20",
            "--seconds-between-status-checks",
            "1",
            "--rerun-incomplete",
            "--latency-wait",
            "10",
            "--workflow-profile",
            "none",
            "--default-resources",
            "cpu='100m'",
            "--nocolor",
        ]
        return [*as_owner(), sys.executable, "-m", "snakemake", *options, *arguments]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start Snakemake; what it prints goes to `log`, anew each time."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.cwd,
                env={**self.environment(), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def run(self, *arguments: str, limit_s: float = 180, **environment: str) -> tuple[int, str]:
        """Run Snakemake to its end; return its exit code and what it printed."""
        process = self.start(*arguments, **environment)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"not ended within {limit_s} s:\n{self.said()}") from None
        return code, self.said()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def place(self) -> str:
        return spec.workdir_identity(str(self.path), [spec.Volume(CLAIM, str(volume()))])

    def objects(self, kind: str) -> list[dict]:
        """The objects of this directory's gangs."""
        return get(kind, "-l", f"kubernetes-gang/place={self.place()}")

    def unlock(self) -> None:
        """A killed Snakemake leaves its lock behind."""
        for lock in (self.path / ".snakemake" / "locks").glob("*"):
            lock.unlink()


def heed_signals() -> None:
    """Tests that a shell started in the background ignore Ctrl-C and hangups, and would hand that on."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            process.wait(30)


if __name__ == "__main__":
    reason = why_not()
    if reason:
        sys.exit(f"the k8s layer is skipped: {reason}")
