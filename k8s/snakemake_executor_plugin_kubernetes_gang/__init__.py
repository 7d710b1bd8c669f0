"""Snakemake executor that runs every job as a gang of pods.

Snakemake runs where the volume is mounted. Pods mount the volume at the same path and run the rule's own
command, so the image does not need Snakemake.
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

from . import jobs, state, status, template, watcher
from .cluster import ApiError, Cluster, Unreachable
from .gangs import ForeignObject, Gangs
from .objects import FINGERPRINT, KINDS, MAIN, Json
from .settings import ExecutorSettings
from .spec import GangSpec, SpecError, parse_volume, workdir_identity
from .workers import Workers

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

SUBMIT_S, DELETE_S = 10, 30  # limits for pending requests when Snakemake ends

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
    """Runs jobs as gangs: `jobs` describes them, `Gangs` creates and deletes them, `Watcher` polls them."""

    def __post_init__(self) -> None:
        settings: ExecutorSettings = self.workflow.executor_settings
        try:
            self._site = _site(self.workflow, settings)
            cluster = Cluster(settings.context, settings.namespace, self._say)
            kinds = {"Job", KINDS[settings.backend]}
            self._gangs = Gangs(cluster, self._site.workdir_id, kinds, self._say, self._on_error)
            self._gangs.start()
        except (SpecError, Unreachable) as error:
            raise WorkflowError(str(error)) from error
        except ApiError as error:
            raise WorkflowError(
                f"{error}: see docs/kubernetes.md for the permissions that the executor needs"
            ) from error
        self._watcher = watcher.Watcher(self._gangs, self._site, self._say, self._show)
        self._submitter = Workers("submitter", self._on_error)
        self._reaper = Workers("reaper", self._on_error)
        self._causes: dict[Any, str] = {}  # by job: why its last attempt failed
        _treat_hangup_as_ctrl_c()

    def _say(self, text: str) -> None:
        self.logger.info(f"kubernetes-gang: {text}")

    def _show(self, name: str, line: str) -> None:
        """Print a line of rank 0's log on the terminal."""
        print(f"[{name}] {line}", file=sys.stderr, flush=True)

    # -- submission -------------------------------------------------------------------------

    def run_job(self, job: Any) -> None:
        """Start to submit a job; called by Snakemake."""
        info = SubmittedJobInfo(job=job)
        with self._reporting_refusal(info):
            spec = jobs.spec_of(job, self._site, self.format_job_exec)
            info.external_jobid = spec.name
            self._submitter.put(lambda: self._submit(info, spec))

    @contextmanager
    def _reporting_refusal(self, info: SubmittedJobInfo) -> Iterator[None]:
        """If a gang cannot be created, report why as its job's error."""
        try:
            yield
        except (SpecError, ForeignObject) as error:
            self._report_failure(info, f"{error}.")
        except ApiError as error:
            self._report_failure(info, f"The cluster refuses {jobs.rule_name(info.job)}: {error}.")

    def _submit(self, info: SubmittedJobInfo, spec: GangSpec) -> None:
        """In a thread of the submitter: requests are slow, and a gang that is replaced must end first."""
        with self._reporting_refusal(info):
            gang = self._reattach(info.job, spec)
            if not gang:
                spec = self._prepare(info.job, spec)
                if self._submitter.stopped:
                    return
                gang = self._gangs.create(spec)
            info.aux = {"watch": self._watcher.begin(info.job, spec, gang)}
            self.report_job_submission(info, register_job=False)

    def _on_error(self, error: Exception) -> None:
        while not self.workflow.scheduler:  # it does not exist yet when the mirrors start
            time.sleep(0.1)
        self.workflow.scheduler.executor_error_callback(error)

    def _reattach(self, job: Any, spec: GangSpec) -> Json | None:
        """Return the gang that an earlier controller created, if it is the one that the job needs."""
        gang = None if self._gangs.is_new(spec) else self._gangs.find(spec)
        if not gang:
            self._gangs.end_elsewhere(spec)
            return None
        reason = self._reason_to_replace(gang, job, spec)
        if reason:
            self._say(f"{spec.name} is replaced: {reason}")
            self._gangs.remove(gang, spec)
            return None
        ended = status.read(gang, (), spec.nodes).phase == "succeeded"
        how = "adopted, it has already ended" if ended else "re-attached to the running gang"
        self._say(f"{spec.name}: {how}")
        self._gangs.adopt_helpers(gang, self._gangs.helpers_of(spec))
        job.register(external_jobid=spec.name)
        return gang

    def _reason_to_replace(self, gang: Json, job: Any, spec: GangSpec) -> str:
        """Why an existing gang is not the one that the job needs; empty if it is."""
        mark = gang["metadata"].get("annotations", {}).get(FINGERPRINT)
        phase = status.read(gang, (), spec.nodes).phase
        if "deletionTimestamp" in gang["metadata"]:
            return "it is being deleted"
        if mark != spec.annotations[FINGERPRINT]:
            return "its command, image or inputs have changed"
        if phase == "failed":
            return "it has failed"
        if phase == "succeeded" and not all(map(os.path.exists, job.output)):
            return "its output no longer exists"
        # Groups and scripts run in a Snakemake of the pod, which creates its own shadow directories.
        is_lost = jobs.is_direct(job) and getattr(job.rule, "shadow_depth", None)
        return "its shadow directory is lost" if is_lost else ""

    def _prepare(self, job: Any, spec: GangSpec) -> GangSpec:
        if jobs.is_direct(job):
            # Remove old outputs, as a Snakemake in the pod would do.
            self.workflow.async_run(job.prepare())
            spec = jobs.spec_of(job, self._site, self.format_job_exec) if job.shadow_dir else spec
        # Before the gang exists: if the controller then dies, the next one must not regard partial outputs
        # as complete.
        job.register(external_jobid=spec.name)
        return spec

    # -- watching ---------------------------------------------------------------------------

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        """Report the jobs that have ended and yield the others; called by Snakemake."""
        # This thread starts before __post_init__ has run: without jobs, do not use attributes of ours.
        for info in active_jobs:
            try:
                verdict = self._watcher.poll(info.aux["watch"])
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
        """Delete a job's gang, now that Snakemake has recorded the job: earlier, a restart would repeat it."""
        super().handle_job_success(job)
        self._dispose(job)

    def handle_job_error(self, job: Any) -> None:
        """Delete the gang of a failed job."""
        super().handle_job_error(job)
        self._dispose(job)

    def _dispose(self, job: Any) -> None:
        gang = self._watcher.forget(job)
        if gang:
            # Forgotten before the deletion, because a new gang may have the name afterwards.
            self._gangs.forget(gang["metadata"]["name"])
            self._reaper.put(partial(self._gangs.delete, gang))

    def cancel(self) -> None:
        """Stop submitting, then cancel the active jobs."""
        self._submitter.stop(SUBMIT_S)
        super().cancel()

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        """Cancel running gangs, or leave them running, as the option on-exit says."""
        watches = self._watcher.watches()  # `active_jobs` is empty while their status is checked
        names = ", ".join(watch.spec.name for watch in watches)
        if not watches:
            return
        if _on_exit(self._site.settings.on_exit, names) == "leave":
            self._say(f"left running: {names}. Run the same command to re-attach")
            # Snakemake would remove empty directories, to which the gangs will write.
            self.workflow.dag.cleanup_workdir = lambda: None
            return
        self._say(f"cancelling {names}")
        for watch in watches:
            self._reaper.put(partial(self._gangs.delete, watch.gang))

    def shutdown(self) -> None:
        """Finish pending requests, then repeat why jobs failed."""
        super().shutdown()
        self._submitter.stop(SUBMIT_S)
        self._watcher.stop()
        self._reaper.finish(DELETE_S)
        self._gangs.stop()
        for job in self.workflow.scheduler.failed & self._causes.keys():  # after all logs and commands
            self._say(f"{jobs.rule_name(job)} failed: {self._causes[job]}")


def _treat_hangup_as_ctrl_c() -> None:
    """End Snakemake properly when its terminal is closed; nobody can be asked, so gangs are left running.

    By default the process would be killed and leave its lock. Under nohup it continues.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _on_hangup)


def _on_hangup(*_: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell may send it again
    raise KeyboardInterrupt


def _on_exit(setting: str, names: str) -> str:
    """Whether to leave gangs running or to cancel them; asks if there is a terminal."""
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
        SpecError: pods could not run with this user, working directory or environment.
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
            f"the workflow declares envvars: {', '.join(names)}; their values are not written into manifests. Put "
            "them into a Secret of the namespace and name it with --kubernetes-gang-env-secret"
        )
    directory = workflow.persistence.aux_path.absolute() / "kubernetes-gang"
    workdir_id = state.stored_identity(directory, workdir_identity(workdir, volumes))
    snakefile = str(Path(workflow.main_snakefile).absolute())
    return jobs.Site(settings, workdir_id, workdir, snakefile, directory, volumes, common, with_gpus, names)


def _check_user() -> None:
    if os.getuid() == 0:
        raise SpecError(
            "Snakemake runs as root (uid 0), and pods run as the same user, which must not be root. Run Snakemake as "
            "the volume's owner, for example uid 1000"
        )


def _check_mounted(workdir: str, volumes: Any, common: dict[str, Any]) -> None:
    main = [c for c in common.get("spec", {}).get("containers", []) if c["name"] == MAIN]
    paths = [v.path for v in volumes] + [m["mountPath"] for c in main for m in c.get("volumeMounts", [])]
    if not any(Path(workdir).is_relative_to(path) for path in paths):
        raise SpecError(
            f"the working directory {workdir} is not on a volume of the pods ({', '.join(paths) or 'they have none'}). "
            "Name its claim with --kubernetes-gang-volumes claim:/path, with the same path as here"
        )
