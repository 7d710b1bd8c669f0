"""Snakemake executor that runs every job as a gang of pods.

Snakemake runs where the volume is mounted; the pods mount it at the same path and run the rule's own
command, so that the image needs no Snakemake.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

from . import jobs, manifest, place, status, template, watcher
from .cluster import ApiError, Cluster, Unreachable
from .gangs import Foreign, Gangs
from .settings import ExecutorSettings
from .spec import GangSpec, SpecError, parse_volume, place_of
from .workers import Workers

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

SUBMIT_S, DELETE_S = 10, 30  # for what is under way when Snakemake ends

common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
    init_seconds_before_status_checks=1,
)


class Executor(RemoteExecutor):
    """Runs jobs as gangs; see the modules for what each part knows."""

    def __post_init__(self) -> None:
        settings: ExecutorSettings = self.workflow.executor_settings
        try:
            self._site = _site(self.workflow, settings)
            cluster = Cluster(settings.context, settings.namespace, self._say)
            kinds = {"Job", *({manifest.KINDS[settings.backend]})}
            self._gangs = Gangs(cluster, self._site.place, kinds, self._say, self._failed)
            self._gangs.start()
        except (SpecError, Unreachable) as error:
            raise WorkflowError(str(error)) from error
        except ApiError as error:
            raise WorkflowError(
                f"{error}: see docs/kubernetes.md for the rights that the executor needs"
            ) from error
        self._watcher = watcher.Watcher(self._gangs, self._site, self._say, self._show)
        self._submitter = Workers("submitter", self._failed)
        self._reaper = Workers("reaper", self._failed)
        self._causes: dict[Any, str] = {}  # job -> why its last attempt failed
        _hang_up_like_ctrl_c()

    def _say(self, text: str) -> None:
        self.logger.info(f"kubernetes-gang: {text}")

    def _show(self, name: str, line: str) -> None:
        """A line of rank 0's log, on the terminal."""
        print(f"[{name}] {line}", file=sys.stderr, flush=True)

    # -- submission -------------------------------------------------------------------------

    def run_job(self, job: Any) -> None:
        info = SubmittedJobInfo(job=job)
        with self._refusals(info):
            spec = jobs.spec_of(job, self._site, self.format_job_exec)
            info.external_jobid = spec.name
            self._submitter.put(lambda: self._submit(info, spec))

    @contextmanager
    def _refusals(self, info: SubmittedJobInfo) -> Iterator[None]:
        """Report what keeps a gang from being made as its job's error."""
        try:
            yield
        except (SpecError, Foreign) as error:
            self._report_failure(info, f"{error}.")
        except ApiError as error:
            self._report_failure(info, f"The cluster refuses {jobs.rule_name(info.job)}: {error}.")

    def _submit(self, info: SubmittedJobInfo, spec: GangSpec) -> None:
        """In a thread of the submitter: requests take a while, and a gang that is replaced must end first."""
        with self._refusals(info):
            gang = self._take_up(info.job, spec)
            if not gang:
                spec = self._prepare(info.job, spec)
                if self._submitter.stopped:
                    return
                gang = self._gangs.create(spec)
            info.aux = {"watch": self._watcher.begin(info.job, spec, gang)}
            self.report_job_submission(info, register_job=False)

    def _failed(self, error: Exception) -> None:
        while not self.workflow.scheduler:  # it makes us before it is there, and mirrors begin at once
            time.sleep(0.1)
        self.workflow.scheduler.executor_error_callback(error)

    def _take_up(self, job: Any, spec: GangSpec) -> dict[str, Any] | None:
        """Return the gang that an earlier controller has left, if it is what the job asks for."""
        left = None if self._gangs.is_new(spec) else self._gangs.find(spec)
        if not left:
            self._gangs.end_elsewhere(spec)
            return None
        why_not = self._why_not(left, job, spec)
        if why_not:
            self._say(f"{spec.name} is replaced: {why_not}")
            self._gangs.remove(left, spec)
            return None
        ended = status.read(left, (), spec.nodes).phase == "succeeded"
        self._say(
            f"{spec.name}: {'adopted, it ended in between' if ended else 're-attached to the running gang'}"
        )
        self._gangs.adopt_helpers(left, self._gangs.helpers_of(spec))
        job.register(external_jobid=spec.name)
        return left

    def _why_not(self, left: dict[str, Any], job: Any, spec: GangSpec) -> str:
        """Why a gang that exists is not the one to wait for; empty if it is."""
        mark = left["metadata"].get("annotations", {}).get(manifest.FINGERPRINT)
        phase = status.read(left, (), spec.nodes).phase
        if "deletionTimestamp" in left["metadata"]:
            return "it is being deleted"
        if mark != spec.annotations[manifest.FINGERPRINT]:
            return "its command, image or inputs have changed"
        if phase == "failed":
            return "it has failed"
        if phase == "succeeded" and not all(map(os.path.exists, job.output)):
            return "its output is not there any more"
        # Snakemakes in pods, which groups and scripts run in, make their shadow directories themselves.
        is_lost = jobs.is_direct(job) and getattr(job.rule, "shadow_depth", None)
        return "its shadow directory is lost" if is_lost else ""

    def _prepare(self, job: Any, spec: GangSpec) -> GangSpec:
        if jobs.is_direct(job):
            # What a Snakemake in the pod would do before it runs the command: remove old outputs.
            self.workflow.async_run(job.prepare())
            spec = jobs.spec_of(job, self._site, self.format_job_exec) if job.shadow_dir else spec
        # Before the gang is there: a controller that dies right after must not take its half-written
        # outputs for complete ones.
        job.register(external_jobid=spec.name)
        return spec

    # -- watching ---------------------------------------------------------------------------

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        # This thread starts before __post_init__ has run: nothing of ours may be touched without a job.
        for info in active_jobs:
            try:
                verdict = self._watcher.look(info.aux["watch"])
            except (ApiError, Unreachable) as error:
                self.logger.debug(f"kubernetes-gang: {error}")
                verdict = None
            if verdict is None:
                yield info
            elif verdict.success:
                self._finish(info, verdict)
            else:
                self._report_failure(info, verdict.sentence, verdict.logs)

    def _report_failure(self, info: SubmittedJobInfo, cause: str, logs: Sequence[str] = ()) -> None:
        self._causes[info.job] = cause
        self.report_job_error(info, msg=f"{cause} ", aux_logs=list(logs))

    def _finish(self, info: SubmittedJobInfo, verdict: watcher.Verdict) -> None:
        if jobs.is_direct(info.job):
            jobs.write_log(info.job, verdict.log)
            jobs.write_benchmark(
                info.job, verdict.pods, extended=self.workflow.output_settings.benchmark_extended
            )
        self.report_job_success(info)

    # -- the end ----------------------------------------------------------------------------

    def handle_job_success(self, job: Any) -> None:
        """Snakemake has recorded the job: only now may its gang go, or a restart would compute it again."""
        super().handle_job_success(job)
        self._dispose(job)

    def handle_job_error(self, job: Any) -> None:
        super().handle_job_error(job)
        self._dispose(job)

    def _dispose(self, job: Any) -> None:
        gang = self._watcher.forget(job)
        if gang:
            # Now: later a new gang may have the name.
            self._gangs.forget(gang["metadata"]["name"])
            self._reaper.put(partial(self._gangs.delete, gang))

    def cancel(self) -> None:
        self._submitter.stop(SUBMIT_S)
        super().cancel()

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        gangs = self._watcher.watches()  # `active_jobs` is empty while their status is being looked at
        names = ", ".join(watch.spec.name for watch in gangs)
        if not gangs:
            return
        if _on_exit(self._site.settings.on_exit, names) == "leave":
            self._say(f"left running: {names}. The same command takes them up again")
            # It would remove directories that are empty, and that the gangs will write to.
            self.workflow.dag.cleanup_workdir = lambda: None
            return
        self._say(f"cancelling {names}")
        for watch in gangs:
            self._reaper.put(partial(self._gangs.delete, watch.gang))

    def shutdown(self) -> None:
        super().shutdown()
        self._submitter.stop(SUBMIT_S)
        self._watcher.stop()
        self._reaper.finish(DELETE_S)
        self._gangs.stop()
        for job in self.workflow.scheduler.failed & self._causes.keys():  # below all logs and commands
            self._say(f"{jobs.rule_name(job)} failed: {self._causes[job]}")


def _hang_up_like_ctrl_c() -> None:
    """A terminal that goes away ends Snakemake as Ctrl-C does, but nobody is asked: gangs are left running.

    By default it would die on the spot, and leave its lock. Under nohup it goes on.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _hung_up)


def _hung_up(*_: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell may send it again
    raise KeyboardInterrupt


def _on_exit(setting: str, names: str) -> str:
    """Whether Ctrl-C leaves gangs running or cancels them; asks where there is somebody to ask."""
    if setting != "ask":
        return setting
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "leave"
    try:
        answer = input(f"Running: {names}. [l]eave them running or [c]ancel them? [l] ")
    except (EOFError, OSError, KeyboardInterrupt):
        return "leave"
    return "cancel" if answer.strip().lower().startswith("c") else "leave"


def _site(workflow: Any, settings: ExecutorSettings) -> jobs.Site:
    """What all gangs share.

    Raises:
        SpecError: pods could not work as this controller's partners.
    """
    volumes = tuple(parse_volume(text) for text in settings.volumes or ())
    common = template.load(settings.pod_template or [])
    with_gpus = template.merge(common, template.load(settings.gpu_pod_template or []))
    workdir = str(Path.cwd())
    _check_user()
    _check_mounted(workdir, volumes, common)
    names = tuple(sorted(workflow.spawned_job_args_factory.envvars()))
    if names and not settings.env_secret:
        raise SpecError(
            f"the workflow declares envvars: {', '.join(names)}; their values do not go into manifests. Put them into "
            "a Secret of the namespace and name it with --kubernetes-gang-env-secret"
        )
    state = workflow.persistence.aux_path.absolute() / "kubernetes-gang"
    name = place.identity(state, place_of(workdir, volumes))
    snakefile = str(Path(workflow.main_snakefile).absolute())
    return jobs.Site(settings, name, workdir, snakefile, state, volumes, common, with_gpus, names)


def _check_user() -> None:
    if os.getuid() == 0:
        raise SpecError(
            "Snakemake runs as root (uid 0), and pods run as the same user, which must not be root. Run Snakemake as "
            "the volume's owner, for example uid 1000"
        )


def _check_mounted(workdir: str, volumes: Any, common: dict[str, Any]) -> None:
    main = [c for c in common.get("spec", {}).get("containers", []) if c["name"] == template.MAIN]
    paths = [v.path for v in volumes] + [m["mountPath"] for c in main for m in c.get("volumeMounts", [])]
    if not any(Path(workdir).is_relative_to(path) for path in paths):
        raise SpecError(
            f"the working directory {workdir} is on no volume of the pods ({', '.join(paths) or 'there are none'}). "
            "Name its claim with --kubernetes-gang-volumes claim:/path, the same path as here"
        )
