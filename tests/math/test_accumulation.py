"""One optimizer step has the gradient of the whole batch, over any micro-batches, processes and ZeRO stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accumulation
import pytest
import torch
import trainings

from rlhf.data.rows import Rows
from rlhf.models import loading
from rlhf.training import sft


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("accumulation-data")
    trainings.write_rows(path, "sft", vocabulary=64)
    return path


@pytest.fixture(scope="module", params=[1, 2])
def results(request, actor_path, data, tmp_path_factory):
    """Return what a number of processes wrote."""
    root = tmp_path_factory.mktemp("accumulation")
    script = str(Path(__file__).with_name("accumulation.py"))
    options = ["--processes", str(request.param), "--log", str(root / "log")]
    launch = [sys.executable, str(trainings.SCRIPTS / "launch.py"), *options]
    command = [*launch, script, str(actor_path), str(data), str(root / "out.pt")]
    run = subprocess.run(command, capture_output=True, env=trainings.environment(), check=False)
    assert run.returncode == 0, (root / "log").read_text()[-4000:]
    return torch.load(root / "out.pt")


@pytest.fixture(scope="module")
def gradients(actor_path, data):
    """Return name -> the gradient of the mean loss of the whole batch, by torch alone."""
    model, task, rows = (
        loading.load_actor(actor_path, torch.float32),
        sft.task(trainings.PAD),
        Rows(data / "train"),
    )
    batch = [rows[i] for i in range(accumulation.ROWS)]
    (trainings.loss(task, model, batch) / task.terms(batch)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", accumulation.MICRO_BATCH_SIZES)
@pytest.mark.parametrize("zero", accumulation.ZERO)
def test_any_number_of_micro_batches_and_processes_gives_the_gradient_of_the_batch(
    results, gradients, zero, size
):
    step = results["steps"][zero, size]
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    assert step["norm"] == pytest.approx(float(norm), rel=1e-5)
    assert step["moved"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(step["moved"][name], -gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_a_step_is_refused_before_the_last_micro_batches(results):
    *early, complete = results["refused"]
    assert all(early)
    assert not complete
