"""The plan, and functions of the wildcards that look things up in it."""

import atexit
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(workflow.basedir) / "scripts"
sys.path.insert(0, str(SCRIPTS))

from snakemake.cli import get_argument_parser

from rlhf import logs
from rlhf.config import yaml_file
from rlhf.config.scenario import load_config
from rlhf.config.stages import STAGES
from rlhf.errors import USER_ERROR, UserError
from rlhf.machine import visible_gpus
from rlhf.store import codehash, layout, naming, plan as planning, provenance

# What is on the command line, by Snakemake's own parser: it reports its targets only after it has read this
# file. A job that Snakemake starts has no targets.
ARGUMENTS = get_argument_parser().parse_args(sys.argv[1:])


# Options with which Snakemake shows or cleans something instead of building it.
QUERIES = """
    archive cleanup_metadata containerize d3dag dag delete_all_output delete_temp_output detailed_summary dryrun
    filegraph generate_unit_tests lint list_changes list_input_changes list_params_changes list_rules
    list_target_rules list_untracked print_compilation report rulegraph summary unlock
""".split()


def is_query():
    """Whether the command line asks for something to be shown or cleaned, not built."""
    return any(getattr(ARGUMENTS, option, None) for option in QUERIES)


def scenarios_of(targets):
    """Scenarios named by targets, in that order."""
    parts = (os.path.normpath(target).split("/") for target in targets)
    return [p[1] for p in parts if p[0] == "results" and len(p) > 2]


def refuse_unusable_volume(pvc):
    """Refuse a volume that does not exist or cannot be written to, before anything starts.

    It is not created: if a mount is missing, a directory in its place would fill this machine's disk.
    """
    if not (Path(pvc).is_dir() and os.access(pvc, os.W_OK)):
        raise UserError(
            f"pvc = {pvc!r} is not a writable directory: give an absolute path or one relative to"
            f" {os.getcwd()}, and create or mount it if it does not exist"
        )


@contextmanager
def one_message():
    """A user's mistake inside of the block ends Snakemake with one message and code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def refuse_unreadable(path):
    """Refuse a file that is not YAML or has a key twice, with file and line.

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
        settings = load_config(config)
        refuse_unusable_volume(settings.pvc)

        def fingerprint(source):
            return naming.fingerprint(Path(settings.pvc, source))

        targets = ARGUMENTS.targets or []
        scenarios = scenarios_of(targets)
        plan = planning.plan(settings, codehash.digest, fingerprint, scenarios)
        planning.refuse_unknown(plan, (t for t in targets if t != "all"))
        wanted = set(scenarios) or set(settings.scenarios)
        provenance.refuse_incomplete(
            Path(settings.pvc, made.path)
            for made in plan.artefacts.values()
            if wanted & set(made.scenarios)
        )
        planning.refuse_misplaced(
            settings,
            scenarios,
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


def script(name):
    """The path of an entry script: code is in the repository, wherever the volume is."""
    return f"{SCRIPTS}/{name}"


class Planned:
    """The planned artefact at `path`, a pattern. Methods are functions of the wildcards."""

    def __init__(self, path):
        self.path = path

    def artefact(self, wildcards):
        return PLAN.artefacts[self.path.format(**wildcards)]

    def parents(self, wildcards):
        """The paths of the artefacts that it is made from."""
        return list(self.artefact(wildcards).parents.values())

    def script(self, wildcards):
        """The path of the entry script that makes it."""
        return script(self.artefact(wildcards).script)

    def spec(self, wildcards):
        """What its script reads, as one JSON text."""
        return json.dumps(self.artefact(wildcards).spec, sort_keys=True)

    def run(self, wildcards):
        """How it is executed, as one JSON text."""
        return self.artefact(wildcards).run.model_dump_json()

    def run_value(self, name):
        """A function of the wildcards: one value of how it is executed."""
        return lambda wildcards: getattr(self.artefact(wildcards).run, name)

    def message(self, wildcards):
        """In words, what a job makes and for whom."""
        made = self.artefact(wildcards)
        text = f"{made.title} for {', '.join(made.scenarios)}"
        if made.run_differs:
            others = ", ".join(made.run_differs)
            text += (
                f" (run as {made.scenarios[0]} says; {others} would run it otherwise)"
            )
        return text + (f", on {machines(made.run)}" if made.run else "")


def machines(run):
    """In words, what a training occupies."""
    nodes = "one node" if run.nodes == 1 else f"{run.nodes} nodes"
    gpus = {0: "no GPU", 1: "one GPU"}.get(run.gpus, f"{run.gpus} GPUs")
    return f"{nodes} with {gpus}{' each' if run.nodes > 1 else ''}"


def link_source(path):
    """A function of the wildcards: the artefact that a name under `results/` leads into."""
    return lambda wildcards: PLAN.artefact_of(path.format(**wildcards)).path


def name_results():
    """Correct the names under `results/` of the requested scenarios, at the start and at the end of a run.

    Names that lead elsewhere than the plan says are corrected once their artefact exists: Snakemake would keep
    some of them. What a requested result was built from gets its name too, because people look for it.
    """
    if not workflow.is_main_process or is_query():
        return
    targets = ARGUMENTS.targets or ["all"]
    requested = {os.path.normpath(target) for target in targets if target != "all"}
    requested.update(DEFAULT_RESULTS if "all" in targets else [])
    scenarios = set(scenarios_of(requested))
    companions = {
        os.path.join(*result.split("/", 2)[:2], name)
        for result in requested
        for name in layout.COMPANIONS.get(result.split("/", 2)[-1], ())
    }
    for result, path in PLAN.results.items():
        link, target = Path(result), relative(result, path)
        is_wrong = link.is_symlink() and os.readlink(link) != target
        is_lacking = result in companions and not link.is_symlink()
        is_meant = link.parts[1] in scenarios and (is_wrong or is_lacking)
        if is_meant and Path(path).exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def relative(result, path):
    """A result's path, relative to the directory of its name, which may be behind a link."""
    return os.path.relpath(path, os.path.realpath(Path(result).parent))


def link_target(path):
    """A function of the wildcards: a result's path, relative to the directory of its name."""

    def target(wildcards):
        result = path.format(**wildcards)
        return relative(result, PLAN.results[result])

    return target


def print_plan_last():
    """End a dry run with the jobs in their order: Snakemake's own reasons would hide them."""
    if workflow.is_main_process and ARGUMENTS.dryrun and not ARGUMENTS.quiet:
        atexit.register(print_plan)


LINKS = ("link", "link_curves")


def print_plan():
    """One line for each job that would run, in order; links cost nothing and are left out.

    A mistake may have ended Snakemake before it had a plan, and what `--dag` prints is for other programs.
    """
    if workflow.scheduler is None or not workflow.dryrun:
        return
    levels = (sorted(level, key=description) for level in workflow.dag.toposorted())
    jobs = [job for level in levels for job in level if workflow.dag.needrun(job)]
    jobs = [job for job in jobs if job.rule.name not in LINKS]
    if not jobs:
        print("\nNothing would run: everything exists.")
        return
    print(
        f"\n{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} would run, in this order:"
    )
    for number, job in enumerate(jobs, start=1):
        print(f"{number:>3}. {description(job)}")


def description(job):
    """In words, what a job makes."""
    return job.message or job.rule.name


def refuse_missing_gpus():
    """Refuse, before anything starts, a job on this machine that wants more GPUs than it has."""
    if workflow.executor_plugin.common_settings.non_local_exec:
        return
    there = len(visible_gpus())
    for job in workflow.dag.needrun_jobs():
        if job.resources.get("gpus", 0) > there:
            print(
                f"error: {description(job)} needs gpus = {job.resources.gpus}, this machine has"
                f" {there}: run it on a cluster (--profile profiles/kubernetes), or give the scenario a run"
                " with gpus: 0",
                file=sys.stderr,
            )
            sys.exit(USER_ERROR)


def report_failures():
    """Say once more, below the long commands that Snakemake prints, what failed on this machine and why.

    A cluster's executor knows more than the logs, and reports failures itself.
    """
    if workflow.executor_plugin.common_settings.non_local_exec:
        return
    if not workflow.scheduler.failed:  # Ctrl-C
        print(
            "stopped: the same command resumes from the last saved state",
            file=sys.stderr,
        )
    for failed in workflow.scheduler.failed:
        for job in getattr(failed, "jobs", [failed]):
            print(
                f"failed: {description(job)}",
                *(f"  {logs.last_words(Path(log))}\n  log: {log}" for log in job.log),
                sep="\n",
                file=sys.stderr,
            )


def sweep_states():
    """Remove the unfinished work of artefacts that are there."""
    for made in PLAN.artefacts.values():
        if Path(made.path, provenance.PROVENANCE).exists():
            shutil.rmtree(layout.work_of(Path(made.path)), ignore_errors=True)
