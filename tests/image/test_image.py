"""The image's install steps, run in a plain Debian root directory instead of a container builder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import dockerfile
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
# What torch's build for GPUs brings along in versions that torch itself pins.
CUDA = re.compile(r"^(nvidia[-_]|cuda[-_]|triton$)")


def shared_with_host() -> list[str]:
    """Paths that pip's settings on this machine name: mirrors and caches that are files."""
    shown = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    words = re.findall(r"(?:file://)?(/[\w./-]+)", shown)
    return sorted({str(Path(word)) for word in words if Path(word).exists()})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A Debian with the steps `system` and `packages` of envs/install.sh."""
    if os.getuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("it needs root and debootstrap")
    place = tmp_path_factory.mktemp("image")
    place.chmod(0o755)  # for who is not root in it
    run("debootstrap", "--variant=minbase", "bookworm", str(place))
    shutil.copy("/etc/resolv.conf", place / "etc" / "resolv.conf")
    build = place / "tmp" / "build"
    build.mkdir(parents=True)
    for name in ("envs/install.sh", "envs/constraints.txt", "pyproject.toml"):
        shutil.copy(REPO / name, build)
    shared = shared_with_host()
    run("mount", "-t", "proc", "proc", str(place / "proc"))
    try:
        run("chroot", str(place), "bash", "/tmp/build/install.sh", "system")
        for path in shared:  # now: ca-certificates wants to write its own first
            _mount(path, place / path.lstrip("/"))
        run("chroot", str(place), "bash", "/tmp/build/install.sh", "packages")
        copy_the_code(place)
        yield place
    finally:
        for path in ["/proc", *reversed(shared)]:
            subprocess.run(
                ["umount", "-l", str(place / path.lstrip("/"))], stderr=subprocess.DEVNULL, check=False
            )
        shutil.rmtree(place, ignore_errors=True)


def copy_the_code(place: Path) -> None:
    """What the Dockerfile does after its packages: a user, the code without what .dockerignore names. And a volume."""
    [user] = re.findall(r"^RUN (useradd .*)", dockerfile.DOCKERFILE.read_text(), flags=re.MULTILINE)
    run("chroot", str(place), *user.split())
    left_out = (REPO / ".dockerignore").read_text().split()
    anywhere = {name.removeprefix("**/") for name in left_out if name.startswith("**/")}
    at_the_top = {name for name in left_out if not name.startswith("**/")}

    def ignored(folder: str, _: list[str]) -> set[str]:
        return anywhere | at_the_top if Path(folder) == REPO else anywhere

    shutil.copytree(REPO, place / "opt" / "rlhf", ignore=ignored)
    (place / "volume").mkdir()
    os.chown(place / "volume", 1000, 1000)


def _mount(path: str, target: Path) -> None:
    folder = target if Path(path).is_dir() else target.parent
    folder.mkdir(parents=True, exist_ok=True)
    target.touch()
    run("mount", "--bind", path, str(target))


def run(*command: str) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_the_images_packages_are_the_locks(root):
    listed = json.loads(run("chroot", str(root), "/opt/venv/bin/pip", "list", "--format", "json"))
    installed = {canonical(p["name"]): p["version"].split("+")[0] for p in listed}
    lines = (REPO / "envs" / "constraints.txt").read_text().splitlines()
    lock = {
        canonical(n): v.split("+")[0] for n, _, v in (line.partition("==") for line in lines if "==" in line)
    }
    own = {"pip", "setuptools", "wheel"}
    others = {n: v for n, v in installed.items() if lock.get(n) != v and n not in own and not CUDA.match(n)}
    assert not others, "in the image, but not in the lock in this version"
    assert {"torch", "deepspeed", "transformers", "snakemake", "kubernetes"} <= set(installed)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_images_python_runs_what_pods_run(root):
    run(
        "chroot",
        str(root),
        "/opt/venv/bin/python",
        "-c",
        "import torch, deepspeed, transformers, snakemake, kubernetes",
    )
    for program in ("bash", "getent", "setpriv"):
        run("chroot", str(root), "which", program)


def test_the_drivers_command_goes_to_the_cluster(root):
    """`snakemake TARGET` with the image's variables and the driver's; no cluster is asked in a dry run."""
    driver = yaml.safe_load((REPO / "k8s/base/driver.yaml").read_text())["spec"]["template"]["spec"]
    values = dockerfile.environment() | {e["name"]: e["value"] for e in driver["containers"][0]["env"]}
    given = [f"{name}={value}" for name, value in values.items()]
    shell = "cd /opt/rlhf && snakemake --dry-run results/single-node/rlhf/actor 2>&1"
    owner = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    run("chroot", str(root), *owner, "env", "-i", *given, "bash", "-c", shell)
    shell = "snakemake --help | grep -e --kubernetes-gang-image; python -m snakemake_executor_plugin_kubernetes_gang gc --help"
    assert "--hours" in run(
        "chroot", str(root), *owner, "env", "-i", *given, "bash", "-c", f"set -e; {shell}"
    )


def test_the_t9k_image_has_sshd_and_pdsh(root):
    no_services = root / "usr" / "sbin" / "policy-rc.d"  # as base images have it
    no_services.write_text("#!/bin/sh\nexit 101\n")
    no_services.chmod(0o755)
    run("chroot", str(root), "bash", "/tmp/build/install.sh", "ssh")
    assert "ssh" in run("chroot", str(root), "pdsh", "-L")
    run("chroot", str(root), "bash", "-c", "ssh-keygen -A && /usr/sbin/sshd -t")
