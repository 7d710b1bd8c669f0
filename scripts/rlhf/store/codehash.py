"""A digest of the code that makes an artefact: an entry script and the `rlhf` modules it imports.

Comments, docstrings and layout do not change it, and every Python version gives the same digest.
(`ast.dump` does not: its fields differ between versions.)
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2]

# Modules that decide where, whether or how something looks, but not its content. The values of the
# configuration are part of the name already. An edit of these modules rebuilds nothing.
NEUTRAL = frozenset(
    {
        "config.scenario",
        "config.section",
        "config.sources",
        "config.stages",
        "config.training",
        "entry.job",
        "errors",
        "files",
        "machine",
        "progress",
        "store.naming",
        "store.provenance",
        "store.publishing",
        "training.health",
    }
)


@cache
def digest(entry: str) -> str:
    """Return the digest of `scripts/{entry}` and every module of `rlhf` that it reaches (16 hex digits)."""
    # With its path below `scripts/`, because two files may have the same name.
    lines = [
        f"{path.relative_to(SCRIPTS).as_posix()} {_file_digest(path)}" for path in _reached(SCRIPTS / entry)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _reached(entry: Path) -> set[Path]:
    """Return `entry` and the modules of `rlhf` that it imports, directly or not."""
    reached, waiting = {entry}, [entry]
    while waiting:
        for module in _imports(waiting.pop()):
            path = SCRIPTS / f"{module.replace('.', '/')}.py"
            if module.removeprefix("rlhf.") not in NEUTRAL and path.exists() and path not in reached:
                reached.add(path)
                waiting.append(path)
    return reached


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache  # several entries reach the same file, and walking through it takes milliseconds
def _imports(path: Path) -> list[str]:
    """Return the dotted names that a file imports from `rlhf`, anywhere in it.

    `from a.b import c` may mean the module a.b.c or a name in the module a.b. Both are returned; the
    caller ignores names that are no files.
    """
    found: list[str] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("rlhf.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf":
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@cache
def _file_digest(path: Path) -> str:
    return hashlib.sha256(canonical(_tree(path)).encode()).hexdigest()


def canonical(node: object) -> str:
    """Return a syntax tree as text, without positions, docstrings and version-dependent fields."""
    if isinstance(node, ast.AST):
        fields = {
            name: value
            for name, value in ast.iter_fields(node)
            if value not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_ignores")
        }
        if _has_docstring(node):
            fields["body"] = fields["body"][1:]
        inner = ",".join(f"{name}={canonical(value)}" for name, value in sorted(fields.items()))
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return "[" + ",".join(map(canonical, node)) + "]"
    return repr(node)


def _has_docstring(node: ast.AST) -> bool:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None
