"""Kubernetes objects as plain JSON: the names that several modules share."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

# API version and plural name, by kind.
RESOURCES = {
    "Pod": ("v1", "pods"),
    "Service": ("v1", "services"),
    "Event": ("v1", "events"),
    "Job": ("batch/v1", "jobs"),
    "JobSet": ("jobset.x-k8s.io/v1alpha2", "jobsets"),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", "trainjobs"),
    "TrainingRuntime": ("trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
    "DeepSpeedJob": ("batch.tensorstack.dev/v1beta1", "deepspeedjobs"),
    "Workload": ("kueue.x-k8s.io/v1beta1", "workloads"),
}
# The kind of a gang's object, by backend.
KINDS = {"job": "Job", "deepspeedjob": "DeepSpeedJob", "trainjob": "TrainJob", "jobset": "JobSet"}
HELPERS = ("Service", "TrainingRuntime")

# The container that runs the rule's command. Two controllers require a name of their own.
MAIN, TRAINJOB_MAIN, DEEPSPEEDJOB_MAIN = "main", "node", "worker"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"  # a pod's rank

# Labels and annotations of the executor. Running gangs have them: do not change these strings.
PREFIX = "kubernetes-gang/"
LABEL_WORKDIR_ID = PREFIX + "place"
LABEL_GANG = PREFIX + "gang"
FINGERPRINT = PREFIX + "fingerprint"
TOKEN = PREFIX + "token"
WORKDIR = PREFIX + "workdir"
MANAGED_BY = {"app.kubernetes.io/managed-by": "kubernetes-gang"}
