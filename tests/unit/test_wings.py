"""The order of the wings of `scripts/rlhf`: who may import whom."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
GROUND = ""  # the modules of rlhf itself
# Wing -> the wings just below it; it may import these and whatever is below them.
BELOW = {
    GROUND: (),
    "config": (GROUND,),
    "store": ("config",),
    "data": ("store",),
    "sources": ("data",),
    "models": ("data",),
    "generation": ("models",),
    "training": ("generation",),
    "evaluation": ("training",),
    "entry": ("evaluation", "sources"),
}
LIGHT = ("config", "store", "entry.job")  # what the Snakefile and every start of a script pay for
HEAVY = {"torch", "transformers", "deepspeed", "kubernetes", "snakemake", "datasets", "matplotlib"}
MODULES = sorted(path for path in (SCRIPTS / "rlhf").rglob("*.py") if path.name != "__init__.py")
ENTRIES = sorted(SCRIPTS.glob("*.py"))


def name_of(path):
    """Return a module's dotted name below rlhf."""
    return ".".join(path.relative_to(SCRIPTS / "rlhf").with_suffix("").parts)


def wing_of(module):
    """Return the wing of a module that is named below rlhf."""
    return module.split(".")[0] if "." in module else GROUND


def imported(path):
    """Yield (level, module, name) of every import in a file, wherever it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def ours(path):
    """Yield the modules of rlhf that a file imports, named below rlhf."""
    for _, module, name in imported(path):
        if module.split(".")[0] == "rlhf":
            whole = f"{module}.{name}".removeprefix("rlhf.")
            inner = module.removeprefix("rlhf").removeprefix(".")
            yield whole if (SCRIPTS / "rlhf" / f"{whole.replace('.', '/')}.py").exists() else inner


def allowed(wing):
    """Return the wings that a wing may import: itself and all below it."""
    return {wing}.union(*(allowed(below) for below in BELOW[wing]))


def test_every_wing_is_in_the_order_and_has_an_empty_init():
    wings = {path.name for path in (SCRIPTS / "rlhf").iterdir() if list(path.glob("*.py"))}
    assert wings == set(BELOW) - {GROUND}
    for init in (SCRIPTS / "rlhf").rglob("__init__.py"):
        assert init.parent == SCRIPTS / "rlhf" or not init.read_text()
        assert not list(imported(init))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_its_own_wing_and_those_below(path):
    for module in ours(path):
        assert wing_of(module) in allowed(wing_of(name_of(path))), module


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nobody_but_scripts_imports_what_reads_the_command_line(path):
    """Mechanism does not know the command line: `entry` is above all, and argparse is nowhere below it."""
    if wing_of(name_of(path)) != "entry":
        assert "argparse" not in {module for _, module, _ in imported(path)}


def light_modules():
    """Return the modules without torch, all of them in `LIGHT`."""
    names = map(name_of, MODULES)
    return [name for name in names if wing_of(name) in LIGHT or name in LIGHT]


def test_the_light_half_never_pays_for_torch():
    statements = "; ".join(f"import rlhf.{name}" for name in light_modules())
    program = f"import sys; {statements}; print(*{HEAVY!r} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []


def test_the_snakefile_imports_the_light_half_alone():
    rules = [
        line for path in (SCRIPTS.parent / "rules").glob("*.smk") for line in path.read_text().splitlines()
    ]
    statements = [line for line in rules if line.startswith(("from rlhf", "import rlhf"))]
    assert statements
    for statement in statements:
        (node,) = ast.parse(statement).body
        assert node.module.split(".")[1:2] in ([], ["errors"], ["machine"], ["config"], ["store"]), statement


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_library_knows_neither_snakemake_nor_kubernetes(path):
    tops = {module.split(".")[0] for _, module, _ in imported(path)}
    assert not tops & {"snakemake", "kubernetes"}


@pytest.mark.parametrize("path", [*MODULES, *ENTRIES], ids=lambda path: path.stem)
def test_imports_are_written_so_that_the_code_digest_sees_them(path):
    """`codehash` follows absolute imports of modules that exist."""
    for level, _, _ in imported(path):
        assert level == 0
    for module in ours(path):
        assert (SCRIPTS / "rlhf" / f"{module.replace('.', '/')}.py").exists(), module
