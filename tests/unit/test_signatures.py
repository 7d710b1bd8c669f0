"""Signatures of the library: few parameters, and docstrings that say what tensors look like."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "scripts" / "rlhf"
MOST = 5  # parameters
DESCRIBED = ("models", "generation", "training")  # wings in which all that is public has a docstring
# (B,), (..., H), (B, T), (N, 1), (T + 1,), or in words.
SHAPE = re.compile(r"\((?:\.\.\.|[A-Z]|\d)\w*(?: [-+*] \w+)?(?:,[^)]*)?\)|\bshapes?\b|\bscalars?\b")


def public(body, prefix=""):
    """Yield (name, node) of public functions, classes and methods."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            yield from public(node.body, f"{node.name}.")


def definitions(*wings):
    """Return (where, name, node) of what is public in some wings; of all if none is named."""
    folders = [LIBRARY / wing for wing in wings] or [LIBRARY]
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return [
        pytest.param(name, node, id=f"{path.relative_to(LIBRARY)}:{name}")
        for path in paths
        for name, node in public(ast.parse(path.read_text()).body)
    ]


def functions(*wings):
    return [param for param in definitions(*wings) if not isinstance(param.values[1], ast.ClassDef)]


def parameters(node):
    """Return the parameters of a function, without `self` and what has a star."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


def has_tensors(node):
    """Return whether a function takes or returns a tensor."""
    annotations = [node.returns, *(argument.annotation for argument in parameters(node))]
    return any("Tensor" in ast.unparse(annotation) for annotation in annotations if annotation)


@pytest.mark.parametrize(("name", "node"), functions())
def test_a_function_has_few_parameters_or_says_why(name, node):
    docstring = ast.get_docstring(node) or ""
    assert len(parameters(node)) <= MOST or "parameters" in docstring, name


@pytest.mark.parametrize(("name", "node"), definitions(*DESCRIBED))
def test_what_is_public_has_a_docstring(name, node):
    assert ast.get_docstring(node), name


@pytest.mark.parametrize(("name", "node"), [p for p in functions() if has_tensors(p.values[1])])
def test_a_function_of_tensors_says_their_shapes(name, node):
    assert SHAPE.search(ast.get_docstring(node) or ""), name
