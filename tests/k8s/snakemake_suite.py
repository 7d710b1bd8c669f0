"""Snakemake's own tests for executors. Run by test_gangs.py as the volume's owner, not collected here."""

import os

from snakemake.common.tests import TestWorkflowsLocalStorageBase

from snakemake_executor_plugin_kubernetes_gang import ExecutorSettings


class TestWorkflows(TestWorkflowsLocalStorageBase):
    __test__ = True

    def get_executor(self):
        return "kubernetes-gang"

    def get_executor_settings(self):
        return ExecutorSettings(
            image=os.environ["SUITE_IMAGE"],
            volumes=[os.environ["SUITE_VOLUME"]],
            pod_template=[os.environ["SUITE_TEMPLATE"]],
        )
