"""Run a command and write its output into its section of docs/results.md, with date, commit and machine.

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
RESULTS = PROJECT / "docs/results.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("section", help="the name between its markers")
    parser.add_argument("command", nargs="+", help="what is run, after --")
    args = parser.parse_args()
    text = replaced(RESULTS.read_text(), args.section, "")  # a missing section is an error before the hours
    run = subprocess.Popen(args.command, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in run.stdout or ():
        print(line, end="", flush=True)
        output += line
    if run.wait() == 0:
        text = replaced(RESULTS.read_text(), args.section, f"{origin()}\n\n```text\n{output.strip()}\n```")
        RESULTS.write_text(text)
    sys.exit(run.returncode)


def replaced(text: str, section: str, content: str) -> str:
    """Return `text` with other content between a section's markers."""
    begin, end = f"<!-- begin: {section} -->", f"<!-- end: {section} -->"
    if not (begin in text and end in text):
        raise SystemExit(f"{RESULTS} has no section {section!r}: add the lines {begin} and {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def origin() -> str:
    """Say when, from which commit and on which machine figures are."""
    commit = git("rev-parse", "--short", "HEAD") + (
        "" if not git("status", "--porcelain", "-uno") else " with changes"
    )
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
