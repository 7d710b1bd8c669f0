"""The training image, whose Dockerfile is linted, and the conda environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import dockerfile
import yaml

REPO = Path(__file__).parents[3]
DOCKERFILE = (REPO / "envs" / "Dockerfile").read_text()


def test_the_dockerfile_is_clean():
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    run = subprocess.run([hadolint, REPO / "envs/Dockerfile"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_training_image_is_not_root_and_has_no_sshd():
    training, t9k = re.split(r"^FROM training AS t9k", DOCKERFILE, flags=re.MULTILINE)
    assert re.findall(r"^USER (.*)", training, flags=re.MULTILINE)[-1] == "1000:1000"
    assert "install.sh ssh" not in training
    assert "install.sh ssh" in t9k


def test_snakemake_finds_the_executor_in_the_image():
    """tests/image checks it with the image's own Snakemake."""
    folders = [Path(path) for path in dockerfile.environment()["PYTHONPATH"].split(":")]
    inside = [REPO / folder.relative_to("/opt/rlhf") for folder in folders]
    assert any(
        (folder / "snakemake_executor_plugin_kubernetes_gang/__init__.py").exists() for folder in inside
    )
    assert any((folder / "rlhf/__init__.py").exists() for folder in inside)


def test_layers_contain_no_secret():
    assert not re.search(r"(?i)(token|password|secret)", DOCKERFILE)
    assert ".git" in (REPO / ".dockerignore").read_text().split()


def test_the_conda_environment_has_the_locked_dependencies_of_the_project():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((REPO / "envs/training.yaml").read_text())
    lines = environment["dependencies"][-1]["pip"]
    assert {name(line) for line in lines} == {name(line) for line in project["dependencies"]}
    assert set(lines) <= set((REPO / "envs/constraints.txt").read_text().split())


def name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
