"""Graphs of forward and backward: the same losses and gradients as without them, in bf16.

Tolerance: kernels get other shapes, and with them other orders of summation. Losses agree to 1e-3 of
themselves, gradients to 2% of their norm, a third of what bf16 is off fp32 (`test_attention.py`).
"""

from __future__ import annotations

import pytest
import torch
from test_attention import PAD, WIDTH, by_kernel, model, sequences

from rlhf.config.training import Lora
from rlhf.models import lora
from rlhf.models.graphs import BodyGraphs
from rlhf.training import sft

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TASK = sft.task(PAD, WIDTH)


def batches():
    """Rows of several shapes, the largest neither first nor last."""
    rows = [[s[: len(s) // 2], s[len(s) // 2 :]] for s in sequences() if len(s) > 3]
    return [rows[3:7], rows[:2], rows, rows[4:6], rows[:4], rows]


def trained(model, adapters):
    model = by_kernel(model.to(torch.bfloat16)).train()
    if adapters:
        lora.add(model, Lora(dim=4, alpha=4.0, learning_rate=1.0), seed=1)
        for layer in lora.layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def gradients(model, rows):
    """Return the loss, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    loss = TASK.loss(model, rows) / TASK.terms(rows)
    loss.backward()
    found = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found)


def agree(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 0.02


@pytest.mark.parametrize("adapters", [False, True])
def test_graphs_give_the_losses_and_gradients_of_the_plain_path(model, adapters):
    model = trained(model, adapters)
    plain = [gradients(model, rows) for rows in batches()]
    model.body_graphs = BodyGraphs(model)
    for rows, theirs in zip(batches(), plain, strict=True):
        agree(gradients(model, rows), theirs)
    assert len(model.body_graphs._graphs) > 1
    for rows, theirs in zip(batches(), plain, strict=True):  # replayed, none is captured again
        agree(gradients(model, rows), theirs)


def test_graphs_use_weights_as_they_are_and_add_gradients_up(model):
    model = trained(model, adapters=False)
    first, second = batches()[1:3]
    model.body_graphs = BodyGraphs(model)
    gradients(model, first), gradients(model, second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    by_graph = [gradients(model, rows) for rows in (first, second)]
    (TASK.loss(model, first) / TASK.terms(first)).backward()
    both = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.body_graphs = None
    plain = [gradients(model, rows) for rows in (first, second)]
    for ours, theirs in zip(by_graph, plain, strict=True):
        agree(ours, theirs)
    agree((0.0, both), (0.0, plain[0][1] + plain[1][1]))


def test_nothing_is_captured_without_gradients(model):
    model = trained(model, adapters=False)
    model.body_graphs = BodyGraphs(model)
    with torch.no_grad():
        TASK.loss(model, batches()[0])
    assert not model.body_graphs._graphs
