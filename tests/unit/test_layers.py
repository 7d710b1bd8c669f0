from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
HEAVY = {"torch", "transformers", "deepspeed", "kubernetes", "snakemake"}
LIBRARY = sorted((SCRIPTS / "rlhf").glob("*.py"))


def imported(path):
    """Yield (level, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def imported_by_the_snakefile():
    """Return the modules of the library that rules/common.smk imports."""
    text = (SCRIPTS.parent / "rules/common.smk").read_text()
    together = re.search(r"^from rlhf import \(([^)]*)\)", text, re.MULTILINE)
    names = [part.split()[0] for part in together[1].split(",") if part.strip()]
    return names + re.findall(r"^from rlhf\.(\w+) import", text, re.MULTILINE)


def test_what_the_snakefile_imports_is_found():
    assert {"config", "plan", "logs", "machine", "yaml_file"} <= set(imported_by_the_snakefile())


@pytest.mark.parametrize(
    "modules",
    [
        *imported_by_the_snakefile(),
        "catalog, batch, ds_config, adapters, splits, jsonl",
        "stage",
        "rows, order",
    ],
)
def test_the_snakefiles_half_never_pays_for_torch(modules):
    program = f"import sys; from rlhf import {modules}; print(*{HEAVY!r} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_knows_neither_snakemake_nor_kubernetes(path):
    tops = {module.split(".")[0] for _, module in imported(path)}
    assert not tops & {"snakemake", "kubernetes"}


@pytest.mark.parametrize("path", [*LIBRARY, *sorted(SCRIPTS.glob("*.py"))], ids=lambda path: path.stem)
def test_imports_are_written_so_that_the_code_digest_sees_them(path):
    """`codehash` follows `rlhf.x` alone, no relative import."""
    for level, module in imported(path):
        assert level == 0
        if module.startswith("rlhf."):
            assert (SCRIPTS / "rlhf" / f"{module.split('.')[1]}.py").exists()


def test_the_package_itself_imports_nothing():
    assert list(imported(SCRIPTS / "rlhf" / "__init__.py")) == []
