"""`tests/record.py`: a command's output in its section of a document."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

TEXT = "# Results\n<!-- begin: a -->\nold\n<!-- end: a -->\nbetween\n<!-- begin: b -->\n<!-- end: b -->\n"


def run(monkeypatch, tmp_path, program, section="a"):
    results = tmp_path / "results.md"
    results.write_text(TEXT)
    other = tmp_path / "other.md"
    other.write_text("# Others\n")
    monkeypatch.setattr(record, "DOCUMENTS", (other, results))
    monkeypatch.setattr(sys, "argv", ["record.py", section, "--", sys.executable, "-c", program])
    with pytest.raises(SystemExit) as end:
        record.main()
    return end.value.code, results.read_text()


def test_output_replaces_its_section_and_nothing_else(monkeypatch, tmp_path):
    code, text = run(monkeypatch, tmp_path, "print('seed 1: 0.5')")
    assert code == 0
    assert "seed 1: 0.5" in text.split("<!-- end: a -->")[0]
    assert "commit" in text
    assert "old" not in text
    assert text.endswith("between\n<!-- begin: b -->\n<!-- end: b -->\n")


def test_a_command_that_fails_changes_nothing(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "print('x'); raise SystemExit(3)") == (3, TEXT)


def test_a_section_that_is_missing_is_an_error_before_the_command_runs(monkeypatch, tmp_path):
    code, text = run(monkeypatch, tmp_path, "raise SystemExit(3)", section="c")
    assert "no document has a section 'c'" in code
    assert text == TEXT
