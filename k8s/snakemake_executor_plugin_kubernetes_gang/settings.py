"""Options of the executor: `--kubernetes-gang-...`, or `kubernetes-gang-...:` in a profile."""

# Snakemake reads these annotations; it knows Optional, not `X | None`, and no strings.

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import ExecutorSettingsBase

from .spec import BACKENDS, QUEUE_SYSTEMS, SpecError, parse_volume

ON_EXIT = ("ask", "leave", "cancel")
# A variable with such a name holds a secret. HF_TOKEN does, TOKENIZERS_PARALLELISM does not.
SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|(?:API)?KEY)$", re.IGNORECASE)
# How Snakemake reads several words as they are.
WORDS = {"parse_func": list, "unparse_func": list}


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """See `snakemake --help`. Mistakes are WorkflowErrors that name the option."""

    image: Optional[str] = field(
        default=None,
        metadata={
            "help": "Container image of the pods; a rule's container: goes before it.",
            "env_var": True,
        },
    )
    namespace: Optional[str] = field(
        default=None, metadata={"help": "Namespace of the pods. Default: the one of the credentials."}
    )
    context: Optional[str] = field(
        default=None,
        metadata={"help": "Context of the kubeconfig. Default: KUBECONFIG, then in-cluster, then ~/.kube."},
    )
    backend: str = field(
        default="job",
        metadata={
            "help": "What a gang with GPUs is made of; one without is always a job.",
            "choices": list(BACKENDS),
        },
    )
    volumes: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "Claims that controller and pods have at the same path: claim:/path[:sub/path].",
            "nargs": "+",
            **WORDS,
        },
    )
    pod_template: Optional[List[Path]] = field(
        default=None,
        metadata={"help": "YAML files with a pod template to merge into every pod.", "nargs": "+", **WORDS},
    )
    gpu_pod_template: Optional[List[Path]] = field(
        default=None, metadata={"help": "The same for pods with GPUs, over the other.", "nargs": "+", **WORDS}
    )
    queue_system: Optional[str] = field(
        default=None,
        metadata={
            "help": "Who keeps the queue that a rule's resource queue names.",
            "choices": list(QUEUE_SYSTEMS),
        },
    )
    on_exit: str = field(
        default="ask",
        metadata={
            "help": "What Ctrl-C does to running gangs. ask: at a terminal; elsewhere they are left running.",
            "choices": list(ON_EXIT),
        },
    )
    start_timeout: int = field(
        default=600,
        metadata={
            "help": "Seconds in which all pods of a gang must start once one has, or once one cannot.",
            "type": int,
        },
    )
    pass_env: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "Environment variables of the controller that pods get too, besides the proxy's.",
            "nargs": "+",
            **WORDS,
        },
    )
    env_secret: Optional[str] = field(
        default=None,
        metadata={"help": "Secret that holds the values of the workflow's envvars:, by their names."},
    )

    def __post_init__(self) -> None:
        for option, value, known in (
            ("backend", self.backend, BACKENDS),
            ("on-exit", self.on_exit, ON_EXIT),
            ("queue-system", self.queue_system, (None, *QUEUE_SYSTEMS)),
        ):
            if value not in known:
                raise WorkflowError(
                    f"--kubernetes-gang-{option} {value}: must be one of {', '.join(filter(None, known))}"
                )
        if self.start_timeout < 1:
            raise WorkflowError(
                f"--kubernetes-gang-start-timeout {self.start_timeout}: must be at least 1 second"
            )
        try:
            for text in self.volumes or []:
                parse_volume(text)
        except SpecError as error:
            raise WorkflowError(f"--kubernetes-gang-volumes: {error}") from error
        for name in filter(SECRET.search, self.pass_env or []):
            raise WorkflowError(
                f"--kubernetes-gang-pass-env {name}: its value would be readable in every pod's manifest. Put it into "
                "a Secret and name that in the pod template (env, valueFrom, secretKeyRef)"
            )
        # Now: later Snakemake goes into the workflow's working directory.
        self.pod_template = [Path(path).absolute() for path in self.pod_template or []]
        self.gpu_pod_template = [Path(path).absolute() for path in self.gpu_pod_template or []]
