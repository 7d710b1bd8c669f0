from __future__ import annotations

import pytest

from snakemake_executor_plugin_kubernetes_gang.objects import LABEL_WORKDIR_ID, TOKEN
from snakemake_executor_plugin_kubernetes_gang.spec import GangSpec


@pytest.fixture
def spec(tmp_path):
    """A gang of one pod in the working directory `here`, whose state is in the test's directory."""
    return GangSpec(
        name="one-0123456789",
        command="true",
        workdir="/w",
        project="/w/Snakefile",
        image="i",
        uid=1,
        gid=1,
        state_dir=str(tmp_path),
        token="mine",
        labels={LABEL_WORKDIR_ID: "here"},
        annotations={TOKEN: "mine"},
    )
