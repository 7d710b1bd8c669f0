"""Identifiers use the words of the glossary: none of those that CONTRIBUTING.md retires."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(
    path for folder in ("scripts", "k8s", "tests", "docs") for path in (ROOT / folder).rglob("*.py")
)
RULES = sorted([ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")])
KUBERNETES = {"phase", "kind"}  # words of its API, which code that speaks with it uses


def retired():
    """Return the words that CONTRIBUTING.md lists as retired in identifiers."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.search(r"Retired in identifiers \(.*?\):(.*?)Retired in prose", text, re.S)[1]
    return re.findall(r"`(\w+)`", listed)


def words(identifier):
    """Return the words that an identifier is made of, in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return [word for word in spaced.lower().split("_") if word]


def holds(identifier, word):
    """Return whether a word is one of an identifier's; one with a capital is a whole identifier."""
    if word[0].isupper():
        return identifier.lstrip("_") == word
    return f"_{word}_" in f"_{'_'.join(words(identifier))}_"


def defined(tree):
    """Yield every identifier that a module defines: a name, an argument, an attribute."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name


def violations(path, identifiers):
    """Return the identifiers of a file that hold a retired word."""
    found = set(retired()) - (KUBERNETES if "k8s" in path.parts else set())
    return sorted({name for name in [path.stem, *identifiers] if any(holds(name, word) for word in found)})


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_the_glossary_retires_some_words():
    assert {"phase", "reply", "told", "Values"} <= set(retired())


@pytest.mark.parametrize(
    ("identifier", "word", "expected"),
    [
        ("test_a_reply_is_read", "reply", True),
        ("_reply", "reply", True),
        ("ReplyReader", "reply", True),
        ("replying", "reply", False),
        ("is_read_as_text", "as_read", False),
        ("was_as_read", "as_read", True),
        ("_Part", "Part", True),
        ("part", "Part", False),
        ("PARTS", "Part", False),
    ],
)
def test_a_word_is_found_in_any_spelling_and_not_in_longer_words(identifier, word, expected):
    assert holds(identifier, word) == expected


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_no_identifier_of_a_module_is_a_retired_word(path):
    assert violations(path, defined(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", RULES, ids=relative)
def test_no_name_in_a_rule_is_a_retired_word(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    assert violations(path, (token.string for token in tokens if token.type == tokenize.NAME)) == []
