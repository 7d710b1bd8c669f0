"""The plan, and functions of the wildcards that look things up in it."""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(workflow.basedir) / "scripts"
sys.path.insert(0, str(SCRIPTS))

from snakemake.cli import get_argument_parser

from rlhf import (
    codehash,
    config as configuration,
    logs,
    plan as planning,
    store,
    yaml_file,
)
from rlhf.errors import UserError
from rlhf.machine import visible_gpus


def requested_targets():
    """What is asked for on the command line, by its own parser: only after this file has been read does
    Snakemake say what its targets are. A job that it starts asks for nothing.
    """
    return get_argument_parser().parse_args(sys.argv[1:]).targets or []


def scenarios_of(targets):
    """Scenarios named by targets, in that order."""
    parts = (os.path.normpath(target).split("/") for target in targets)
    return [p[1] for p in parts if p[0] == "results" and len(p) > 2]


def refuse_unusable_volume(pvc):
    """Refuse a volume that is not there or cannot be written to, before anything starts.

    It is not made: where a mount is missing, a directory in its place would fill this machine's disk.
    """
    if not (Path(pvc).is_dir() and os.access(pvc, os.W_OK)):
        raise UserError(
            f"pvc = {pvc!r} is not a writable directory: give an absolute path or one relative to"
            f" {os.getcwd()}, and make or mount it if it is not there yet"
        )


@contextmanager
def one_message():
    """A user's mistake inside of the block ends Snakemake with one message and code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def refuse_unreadable(path):
    """Refuse a file that is no YAML or in which a key stands twice, by file and line.

    Snakemake accepts duplicate keys, and reports neither file nor line of a YAML error. It has parsed files
    given by --configfile before the Snakefile, so only duplicate keys are left to catch for them here;
    `scripts/store.py --configfile FILE ls` gives the line of other errors.
    """
    if workflow.is_main_process and Path(path).exists():
        with one_message():
            yaml_file.read(Path(path))


def load_plan():
    """The configuration and its plan."""
    with one_message():
        settings = configuration.load(config)
        refuse_unusable_volume(settings.pvc)

        def fingerprint(source):
            return store.fingerprint(Path(settings.pvc, source))

        targets = requested_targets()
        asked = scenarios_of(targets)
        plan = planning.plan(settings, codehash.digest, fingerprint, asked)
        planning.refuse_unknown(plan, (t for t in targets if t != "all"))
        wanted = set(asked) or set(settings.scenarios)
        store.refuse_not_whole(
            Path(settings.pvc, made.path)
            for made in plan.artefacts.values()
            if wanted & set(made.scenarios)
        )
        planning.refuse_misplaced(
            settings,
            asked,
            lambda source: Path(settings.pvc, source).exists(),
        )
        return settings, plan


def set_environment(settings):
    """Set what jobs inherit."""
    if settings.offline:
        os.environ.update(HF_HUB_OFFLINE="1")  # the client's own switch
    # Jobs run `python`: on this machine the interpreter that runs Snakemake, in a pod the image's.
    path = [str(Path(sys.executable).parent), *os.get_exec_path()]
    os.environ.update(PATH=os.pathsep.join(path))


def result_names(plan):
    """What results are called below `results/{scenario}/`, but for curves, which are files."""
    names = {result.split("/", 2)[2] for result in plan.results}
    return {name for name in names if not name.endswith(".png")}


def artefact(path):
    """A function of the wildcards: the planned artefact at `path`, a pattern."""
    return lambda wildcards: PLAN.artefacts[path.format(**wildcards)]


def parents(path):
    """A function of the wildcards: the paths of what an artefact is made from."""
    return lambda wildcards: list(artefact(path)(wildcards).parents.values())


def script(name):
    """The path of an entry script: code lies in the repository, wherever the volume is."""
    return f"{SCRIPTS}/{name}"


def planned_script(path):
    """A function of the wildcards: the path of the entry script that makes an artefact."""
    return lambda wildcards: script(artefact(path)(wildcards).script)


def spec(path):
    """A function of the wildcards: what its script reads, as one JSON text."""
    return lambda wildcards: json.dumps(artefact(path)(wildcards).spec, sort_keys=True)


def run_options(path):
    """A function of the wildcards: how it is run, as one JSON text."""
    return lambda wildcards: artefact(path)(wildcards).run.model_dump_json()


def run_value(path, name):
    """A function of the wildcards: one value of how it is run.

    Pods get their CPUs by `cpu`: Snakemake cuts `threads` to what its own machine has.
    """
    return lambda wildcards: getattr(artefact(path)(wildcards).run, name)


def describe(path):
    """A function of the wildcards: in words, what a job makes and for whom."""

    def message(wildcards):
        made = artefact(path)(wildcards)
        text = f"{made.title} for {', '.join(made.scenarios)}"
        if made.run_differs:
            others = ", ".join(made.run_differs)
            text += (
                f" (run as {made.scenarios[0]} says; {others} would run it otherwise)"
            )
        return text + (f", on {machines(made.run)}" if made.run else "")

    return message


def machines(run):
    """In words, what a training takes up."""
    nodes = "one node" if run.nodes == 1 else f"{run.nodes} nodes"
    gpus = {0: "no GPU", 1: "one GPU"}.get(run.gpus, f"{run.gpus} GPUs")
    return f"{nodes} with {gpus}{' each' if run.nodes > 1 else ''}"


def link_source(path):
    """A function of the wildcards: the artefact that a name under `results/` leads into."""
    return lambda wildcards: PLAN.artefact_of(path.format(**wildcards)).path


def link_target(path):
    """A function of the wildcards: a result's place, relative to where its name lies."""

    def target(wildcards):
        result = path.format(**wildcards)
        return os.path.relpath(PLAN.results[result], Path(result).parent)

    return target


def refuse_missing_gpus():
    """Refuse, before anything starts, a job on this machine that wants more GPUs than it has."""
    if workflow.executor_plugin.common_settings.non_local_exec:
        return
    there = len(visible_gpus())
    for job in workflow.dag.needrun_jobs():
        if job.resources.get("gpus", 0) > there:
            print(
                f"error: {job.message or job.rule.name} asks for gpus = {job.resources.gpus}, this machine has"
                f" {there}: run it on a cluster (--profile profiles/kubernetes), or give the scenario a run"
                " with gpus: 0",
                file=sys.stderr,
            )
            sys.exit(2)


def tell_failures():
    """Say once more, below the long commands that Snakemake prints, what failed on this machine and why.

    A cluster's executor knows more than logs do, and says it itself.
    """
    if workflow.executor_plugin.common_settings.non_local_exec:
        return
    if not workflow.scheduler.failed:  # Ctrl-C
        print("stopped: the same command goes on from what is saved", file=sys.stderr)
    for failed in workflow.scheduler.failed:
        for job in getattr(failed, "jobs", [failed]):
            print(
                f"failed: {job.message or job.rule.name}",
                *(f"  {logs.last_words(Path(log))}\n  log: {log}" for log in job.log),
                sep="\n",
                file=sys.stderr,
            )


def sweep_states():
    """Remove the unfinished work of artefacts that are there."""
    for made in PLAN.artefacts.values():
        if Path(made.path, store.PROVENANCE).exists():
            shutil.rmtree(store.work_of(Path(made.path)), ignore_errors=True)
