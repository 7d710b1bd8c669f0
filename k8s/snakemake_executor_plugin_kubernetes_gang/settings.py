"""Options of the executor: `--kubernetes-gang-...`, or `kubernetes-gang-...:` in a profile."""

# Snakemake reads these annotations; it knows Optional, not `X | None`, and no strings.

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.settings import ExecutorSettingsBase

from .objects import KINDS
from .spec import QUEUE_SYSTEMS, SpecError, parse_volume

ON_EXIT = ("ask", "leave", "cancel")
# Names of variables that hold secrets: HF_TOKEN matches, TOKENIZERS_PARALLELISM does not.
SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|(?:API)?KEY)$", re.IGNORECASE)
# Snakemake takes the words of a list option unchanged.
WORDS = {"parse_func": list, "unparse_func": list}


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    """See `snakemake --help`. A wrong value raises a WorkflowError that names the option."""

    image: Optional[str] = field(
        default=None,
        metadata={
            "help": "Container image of the pods; a rule's container: takes precedence.",
            "env_var": True,
        },
    )
    namespace: Optional[str] = field(
        default=None, metadata={"help": "Namespace of the pods. Default: the namespace of the credentials."}
    )
    context: Optional[str] = field(
        default=None,
        metadata={"help": "Context of the kubeconfig. Default: KUBECONFIG, then in-cluster, then ~/.kube."},
    )
    backend: str = field(
        default="job",
        metadata={
            "help": "Kind of object for gangs with GPUs; gangs without GPUs are always jobs.",
            "choices": list(KINDS),
        },
    )
    volumes: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "Claims that the controller and the pods mount at the same path: claim:/path[:sub/path].",
            "nargs": "+",
            **WORDS,
        },
    )
    pod_template: Optional[List[Path]] = field(
        default=None,
        metadata={"help": "YAML files with a pod template to merge into every pod.", "nargs": "+", **WORDS},
    )
    gpu_pod_template: Optional[List[Path]] = field(
        default=None,
        metadata={"help": "The same for pods with GPUs; merged over the other.", "nargs": "+", **WORDS},
    )
    queue_system: Optional[str] = field(
        default=None,
        metadata={
            "help": "System that manages the queue named by a rule's resource queue.",
            "choices": list(QUEUE_SYSTEMS),
        },
    )
    on_exit: str = field(
        default="ask",
        metadata={
            "help": "What Ctrl-C does to running gangs. ask: asks at a terminal, otherwise leaves them running.",
            "choices": list(ON_EXIT),
        },
    )
    start_timeout: int = field(
        default=600,
        metadata={
            "help": "Seconds within which all pods of a gang must start, once one has started or cannot start.",
            "type": int,
        },
    )
    pass_env: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "Environment variables to pass to pods, in addition to those of the proxy.",
            "nargs": "+",
            **WORDS,
        },
    )
    env_secret: Optional[str] = field(
        default=None,
        metadata={"help": "Secret with the values of the workflow's envvars:, under the same names."},
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_values()
        # Resolved here, because Snakemake changes into the working directory later.
        self.pod_template = [Path(path).absolute() for path in self.pod_template or []]
        self.gpu_pod_template = [Path(path).absolute() for path in self.gpu_pod_template or []]

    def _check_choices(self) -> None:
        for option, value, known in (
            ("backend", self.backend, KINDS),
            ("on-exit", self.on_exit, ON_EXIT),
            ("queue-system", self.queue_system, (None, *QUEUE_SYSTEMS)),
        ):
            if value not in known:
                raise WorkflowError(
                    f"--kubernetes-gang-{option} {value}: must be one of {', '.join(filter(None, known))}"
                )

    def _check_values(self) -> None:
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
