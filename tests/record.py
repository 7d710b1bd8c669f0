"""Run a command and write its output into its section of a document, with date, commit and machine.

python tests/record.py "make learn" -- python tests/learn/learn.py

The command decides the exit code; the section of a failed command stays as it was.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENTS = (PROJECT / "docs/results.md", PROJECT / "tests/gpu/RESULTS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("section", help="the name between its markers")
    parser.add_argument("command", nargs="+", help="what is run, after --")
    args = parser.parse_args()
    document = document_of(args.section)  # a missing section is an error before the hours
    run = subprocess.Popen(args.command, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in run.stdout or ():
        print(line, end="", flush=True)
        output += line
    if run.wait() == 0:
        content = f"{origin()}\n\n```text\n{output.strip()}\n```"
        document.write_text(replaced(document.read_text(), args.section, content))
    sys.exit(run.returncode)


def document_of(section: str) -> Path:
    """Return the document that has a section."""
    begin, end = markers(section)
    for document in DOCUMENTS:
        if begin in (text := document.read_text()) and end in text:
            return document
    raise SystemExit(
        f"no document has a section {section!r}: add the lines {begin} and {end} to {DOCUMENTS[0]}"
    )


def markers(section: str) -> tuple[str, str]:
    """Return the lines before and after a section."""
    return f"<!-- begin: {section} -->", f"<!-- end: {section} -->"


def replaced(text: str, section: str, content: str) -> str:
    """Return `text` with other content between a section's markers."""
    begin, end = markers(section)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def origin() -> str:
    """Say when, from which commit and on which machine figures are."""
    # A document that has just got other figures is no change.
    others = [f":!{d.relative_to(PROJECT)}" for d in DOCUMENTS if d.is_relative_to(PROJECT)]
    changed = git("status", "--porcelain", "-uno", "--", ".", *others)
    commit = git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    return f"{datetime.date.today()}, commit {commit}, {processor()}, {os.cpu_count()} cores."


def git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or ("" if run.returncode == 0 else "unknown")


def processor() -> str:
    """Return the CPU's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
