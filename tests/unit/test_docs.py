"""Documents are true: paths exist, links lead somewhere, commands and examples work."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from rlhf.store import layout
from rlhf.training import health
from rlhf.training.metric_names import PPO_METRICS

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "tests", "k8s", "profiles", "envs", ".github")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
TOP = {path.name for path in ROOT.iterdir()}  # names in the repository's own directory
# Files of artefacts, models and clusters, which are in no repository.
MADE = {
    getattr(layout, name) for name in dir(layout) if name.isupper() and isinstance(getattr(layout, name), str)
}
MADE |= {"provenance.json", "run.json", "config.json", "generation_config.json", "rlhf.lock"}
# On a volume, in a container or at the user's, not in the repository.
ELSEWHERE = re.compile(
    r"(results|store|work|models|datasets|logs|benchmarks|data)/|\.snakemake/|\{|claim:|\.{0,2}/|~|\$|refs/"
)
FILE = re.compile(r"[\w.*-]+\.(py|md|smk|ya?ml|toml|txt|json|jsonl|lock|png|svg|tsv|sh)")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
# Commands of other programs, or of the shell, which are not tried.
SKIPPED = {
    "kubectl",
    "pip",
    "docker",
    "podman",
    "git",
    "cd",
    "export",
    "for",
    "do",
    "done",
    ".",
    "tensorboard",
}
SKIPPED |= {"nohup", "image", "cat", "cp"}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def prose(document):
    """Return a document's text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)


def exists(path, beside):
    """Return whether a path with `*` is that of something in the repository or beside a document."""
    return any(any(folder.glob(path.rstrip("/"))) for folder in (ROOT, beside))


def missing(word, beside):
    """Return whether a word looks like a path of the repository and is none."""
    word = word.rstrip(".,;:")
    if ELSEWHERE.match(word) or word in MADE:
        return False
    if "/" not in word:
        return (
            bool(FILE.fullmatch(word)) and not any(ROOT.glob(f"[!.]*/**/{word}")) and not exists(word, beside)
        )
    return (word.split("/")[0] in TOP or bool(FILE.fullmatch(word.split("/")[-1]))) and not exists(
        word, beside
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_path_in_back_ticks_exists(document):
    quoted = re.findall(r"`([^`\n]+)`", prose(document))
    assert [word for text in quoted for word in text.split() if missing(word, document.parent)] == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("scripts/rlhf/store/plan.py", False),
        ("scripts/*.py", False),
        ("plan.py", False),
        ("scripts/rlhf/plan.py", True),
        ("gone/plan.py", True),
        ("nothing.py", True),
        ("facebook/opt-1.3b", False),
        ("results/tiny/rlhf/actor", False),
        ("metrics.jsonl", False),
    ],
)
def test_a_path_that_is_gone_is_noticed(word, expected):
    assert missing(word, ROOT) == expected


def undefined(name):
    """Return whether `wing.module.name` is no function, class or constant of our library."""
    wing, module, wanted = name.split(".")
    path = ROOT / "scripts/rlhf" / wing / f"{module}.py"
    body = ast.parse(path.read_text()).body if path.exists() else []
    assigned = {
        t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    return wanted not in assigned | {getattr(node, "name", None) for node in body}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_function_in_back_ticks_exists(document):
    wings = "|".join(path.name for path in (ROOT / "scripts/rlhf").iterdir() if path.is_dir())
    names = re.findall(rf"`((?:{wings})\.\w+\.\w+)`", prose(document))
    assert [name for name in names if undefined(name)] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("training.ppo_math.gae", False), ("training.ppo_math.gone", True), ("training.gone.gae", True)],
)
def test_a_function_that_is_gone_is_noticed(name, expected):
    assert undefined(name) == expected


@cache
def anchors(document):
    """Return the anchors of a document's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ +(.*)", prose(document), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file_and_heading_of_the_repository(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_a_document_refers_to_no_file_of_somebodys_own_machine(document):
    assert re.findall(r"(?<![\w.:/])(?:/home|/work|/tmp|/Users|shared)/[\w./-]+", document.read_text()) == []


def test_each_metric_of_ppo_has_a_row_in_its_document_and_no_other_has():
    text = (ROOT / "docs" / "ppo.md").read_text()
    (table,) = re.findall(r"^\| metric \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == sorted(PPO_METRICS)
    assert len(table.splitlines()) == len(PPO_METRICS)


def test_bounds_of_health_are_of_metrics_that_there_are():
    assert {bound.metric for bound in health.BOUNDS} <= set(PPO_METRICS)


def commands(document):
    """Yield the commands of a document's `sh` blocks, word by word, without variables before them."""
    for block in SHELL.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z]\w*=", words[0]):
                words.pop(0)
            if words:
                yield tuple(word.removeprefix(".venv/bin/") for word in words)


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(document)})


def called(*start):
    """Return the commands that begin with some words, without these, as cases of a test."""
    found = [command[len(start) :] for command in COMMANDS if command[: len(start)] == start]
    return [pytest.param(words, id=" ".join(words)) for words in found]


def test_every_command_is_tried_or_skipped_on_purpose():
    tried = {
        ("make",),
        ("snakemake",),
        ("python", "-m", "pytest"),
        ("python", "-m", "snakemake_executor_plugin_kubernetes_gang"),
    }
    for command in COMMANDS:
        script = command[0] == "python" and command[1].endswith(".py")
        first = command[0].split("=")[0]
        assert script or first in SKIPPED or any(command[: len(t)] == t for t in tried), command


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_path_in_a_command_exists(command):
    assert [word for word in command if word != "my.yaml" and missing(word, ROOT)] == []


@pytest.mark.parametrize("words", called("make"))
def test_every_target_of_make_exists(words):
    run = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def examples():
    """Return the scenarios of all documents' examples, and what else they set, as one configuration."""
    scenarios = {}
    for document in DOCUMENTS:
        for block in re.findall(r"^```yaml\n(.*?)^```", document.read_text(), re.M | re.S):
            scenarios |= (yaml.safe_load(block) or {}).get("scenarios", {})
    return scenarios


@pytest.mark.parametrize("words", called("snakemake"))
def test_every_target_of_snakemake_can_be_planned(empty, words):
    """With the documents' own examples of scenarios; `my.yaml` holds one of them."""
    options = [word for word in words if word not in ("--configfile", "my.yaml", "--")]
    named = {target.split("/")[1] for target in options if target.startswith("results/")}
    mine = {name: example for name, example in examples().items() if name in named}
    config = yaml.safe_dump({"scenarios": mine}) if mine else ""
    if "--profile" in options and "--config" not in options:  # the profile's volume is a pod's
        options += ["--config", f"pvc={empty.volume}"]
    run = empty.snakemake("-n", *options, config=config, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_example_of_a_scenario_is_valid(empty):
    """Files on the volume are the reader's."""
    (empty.volume / "data").mkdir()
    (empty.volume / "data/mine.jsonl").touch()
    scenarios = examples()
    assert scenarios
    targets = [f"results/{name}/rlhf/actor" for name in scenarios]
    empty.snakemake("-n", *targets, config=yaml.safe_dump({"scenarios": scenarios}))


@cache
def usage(*program):
    """Return what a program says of itself."""
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def unknown(words, program):
    """Return the options among some words, and the first word of a program with subcommands, that it has not."""
    said = usage(*program)
    options = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    listed = re.search(r"\{([\w,-]+)\}", said)
    wanted = [word for word in words if re.fullmatch(r"[a-z]+", word)][:1] if listed else []
    return [o for o in options if not re.search(rf"(?<![\w-]){o}\b", said)] + [
        word for word in wanted if word not in listed[1].split(",")
    ]


SCRIPTS = [c for c in COMMANDS if c[0] == "python" and c[1].startswith("scripts/")]


@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_every_option_of_a_script_exists(command):
    assert unknown(command[2:], command[1:2]) == []


@pytest.mark.parametrize("words", called("python", "-m", "snakemake_executor_plugin_kubernetes_gang"))
def test_every_subcommand_of_the_executor_exists(words):
    assert unknown(words, ("-m", "snakemake_executor_plugin_kubernetes_gang")) == []


def decisions() -> list[tuple[str, str]]:
    """Return the title and the text of each entry of DECISIONS.md."""
    parts = re.split(r"^## (.+)$", (ROOT / "DECISIONS.md").read_text(), flags=re.M)[1:]
    return list(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))


@pytest.mark.parametrize(("title", "text"), decisions())
def test_a_decision_is_dated_short_and_in_the_index(title, text):
    date = re.match(r"\*(\d{4}-\d\d-\d\d)\*\n", text)
    assert date, "the date is the first line"
    assert len(text.splitlines()) <= 15
    assert f"| {date[1]} | [{title}](#" in (ROOT / "DECISIONS.md").read_text()


def test_decisions_are_the_newest_first():
    dates = [text.splitlines()[0] for _, text in decisions()]
    assert dates == sorted(dates, reverse=True)
