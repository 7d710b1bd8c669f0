from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf.store import codehash, plan

SCRIPTS, NEUTRAL = Path(__file__).parents[3] / "scripts", codehash.NEUTRAL
OTHER_PYTHONS = [f"python3.{minor}" for minor in (12, 13, 14)]

ENTRY = '''"""Train."""
from rlhf import errors, near  # both

def main(x, *, y=2):
    """Do it."""
    return near.f(x) + 1
'''
NEAR = "import rlhf.far\n\ndef f(x):\n    return rlhf.far.g(x) * 3\n"
FAR = 'from rlhf.errors import key\n\nclass A:\n    """A class."""\n\ndef g(x):\n    return f"{x}" + key\n'
ERRORS = "key = 'k'\n"


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Return a function: what differs from the code above -> digest of the entry script."""
    caches = (codehash.digest, codehash._tree, codehash._imports, codehash._file_digest)
    (tmp_path / "rlhf").mkdir()
    monkeypatch.setattr(codehash, "SCRIPTS", tmp_path)

    def of(entry=ENTRY, near=NEAR, far=FAR, errors=ERRORS, **others):
        (tmp_path / "entry.py").write_text(entry)
        for name, text in {"near": near, "far": far, "errors": errors, **others}.items():
            path = tmp_path / "rlhf" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for cached in caches:
            cached.cache_clear()
        return codehash.digest("entry.py")

    yield of
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    "edited",
    [
        ENTRY.replace("# both", "# one or the other"),
        ENTRY.replace('"""Train."""', '"""Train something.\n\nAt length.\n"""'),
        ENTRY.replace('"""Train."""\n', ""),
        ENTRY.replace('"""Do it."""', "'Do it at once.'"),
        ENTRY.replace('    """Do it."""\n', ""),
        ENTRY.replace("x, *, y=2", "\n    x,\n    *,\n    y = 2,\n"),
        ENTRY.replace("near.f(x) + 1", "(\n        near.f(x)  # first\n        + 1)"),
        ENTRY.replace("\n", "\n\n"),
        ENTRY.replace("\n", "\r\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(digest, edited):
    assert edited != ENTRY
    assert digest(entry=edited) == digest()


@pytest.mark.parametrize(
    "edited",
    [
        ENTRY.replace("+ 1", "+ 2"),
        ENTRY.replace("+ 1", "+ 1.0"),
        ENTRY.replace("+ 1", "+ True"),
        ENTRY.replace("+ 1", "- 1"),
        ENTRY.replace("y=2", "y=None"),
        ENTRY.replace("*, y", "y"),
        ENTRY.replace("y=2", "z=2"),
        ENTRY.replace("main", "start"),
        ENTRY.replace("    return", "    if x:\n        return"),
        ENTRY + '"""A string that is no docstring."""\n',
    ],
)
def test_an_edit_that_may_change_what_comes_out_counts(digest, edited):
    assert edited != ENTRY
    assert digest(entry=edited) != digest()


def test_modules_that_are_imported_count_directly_or_not(digest):
    assert digest(near=NEAR.replace("3", "4")) != digest()
    assert digest(far=FAR.replace("{x}", "{x} ")) != digest()


def test_modules_that_are_not_imported_do_not_count(digest):
    assert digest(unrelated="x = 1\n") == digest(unrelated="x = 2\n") == digest()


def test_an_import_inside_a_function_counts(digest):
    entry = ENTRY + "\ndef late():\n    from rlhf import later\n"
    assert digest(entry=entry, later="x = 1\n") != digest(entry=entry, later="x = 2\n")


def test_neutral_modules_do_not_count(digest):
    assert "errors" in codehash.NEUTRAL
    assert digest(errors="from rlhf import more\nkey = 'another'\n", more="x = 1\n") == digest()


def test_modules_that_import_each_other_are_read_once(digest):
    assert digest(far=FAR + "from rlhf import near\n") != digest()


def test_two_modules_that_swap_their_content_count(digest):
    assert digest(near=FAR + NEAR, far=NEAR) != digest(near=NEAR, far=FAR + NEAR)


@pytest.mark.parametrize(
    "statement",
    [
        "from rlhf.wing import inner",
        "from rlhf.wing.inner import x",
        "import rlhf.wing.inner",
        "import rlhf.wing.inner as inner",
    ],
)
def test_modules_of_a_wing_count_however_they_are_imported(digest, statement):
    entry = f"{statement}\n"
    one, two = ({"wing.inner": f"x = {value}\n", "wing.other": "x = 1\n"} for value in (1, 2))
    assert digest(entry=entry, **one) != digest(entry=entry, **two)
    assert digest(entry=entry, **one) == digest(entry=entry, **one | {"wing.other": "x = 2\n"})


def test_two_files_of_one_name_both_count(digest):
    entry = "from rlhf.left import same\nfrom rlhf.right import same as other\n"
    sides = {"left.same": "x = 1\n", "right.same": "x = 2\n"}
    digests = {
        digest(entry=entry, **sides),
        digest(entry=entry, **sides | {"left.same": "x = 3\n"}),
        digest(entry=entry, **sides | {"right.same": "x = 3\n"}),
        digest(entry=entry, **{"left.same": "x = 2\n", "right.same": "x = 1\n"}),
    }
    assert len(digests) == 4


def test_a_module_that_moved_is_found_at_its_new_place_and_renames(digest):
    before = digest(entry="from rlhf.old import f\n", **{"old.f": "x = 1\n", "new.f": "x = 1\n"})
    moved = "from rlhf.new import f\n"
    after = digest(entry=moved, **{"old.f": "x = 1\n", "new.f": "x = 1\n"})
    assert after != before
    assert digest(entry=moved, **{"old.f": "x = 1\n", "new.f": "x = 2\n"}) != after


def test_a_neutral_modules_namesake_counts(digest):
    assert "errors" in codehash.NEUTRAL
    one, two = ({"wing.errors": f"x = {value}\n"} for value in (1, 2))
    assert digest(entry="from rlhf.wing import errors\n", **one) != digest(
        entry="from rlhf.wing import errors\n", **two
    )


def test_no_module_that_computes_is_lost_behind_neutral_ones(monkeypatch):
    """What entry scripts reach through neutral modules alone counts nowhere: that may be words, no formula."""
    entries = [SCRIPTS / entry for entry in {*plan.ENTRY.values(), *plan.FETCH.values()}]
    counted = set().union(*map(codehash._reached, entries))
    monkeypatch.setattr(codehash, "NEUTRAL", frozenset())
    reached = set().union(*map(codehash._reached, entries))
    lost = {".".join(path.relative_to(SCRIPTS / "rlhf").with_suffix("").parts) for path in reached - counted}
    assert lost - NEUTRAL == set()


def test_who_the_reference_is_counts_for_ppo(tmp_path, monkeypatch):
    digest = codehash.digest.__wrapped__  # not the cached one
    before = digest("train_ppo.py")
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    monkeypatch.setattr(codehash, "SCRIPTS", tmp_path / "scripts")
    edited = tmp_path / "scripts/rlhf/config/reference.py"
    edited.write_text(edited.read_text().replace("actor_lora.only", "not actor_lora.only"))
    assert digest("train_ppo.py") != before


@pytest.mark.parametrize("name", OTHER_PYTHONS)
def test_other_versions_of_python_give_the_same_digests(name):
    pyenv = sorted((Path.home() / ".pyenv/versions").glob(f"{name.removeprefix('python')}.*/bin/{name}"))
    python = pyenv[-1] if pyenv else shutil.which(name)  # its shims are no interpreters
    if not python:
        pytest.skip(f"there is no {name} on this machine")
    entries = list(plan.ENTRY.values())
    program = f"from rlhf.store import codehash; print(*map(codehash.digest, {entries!r}))"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    there = subprocess.run(
        [python, "-B", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == [codehash.digest(entry) for entry in entries]
