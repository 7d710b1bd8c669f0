"""Graphs of forward and backward: the same losses and gradients as without them, in bf16.

Tolerance: kernels get other shapes, and with them other orders of summation. Losses agree to 1e-3 of
themselves, gradients to 2% of their norm, a third of what bf16 is off fp32 (`test_attention.py`). Padded rows
of another width may get another kernel of attention: their gradients agree to 6%.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_attention import PAD, WIDTH, by_kernel, model, sequences

from rlhf.config.training import Lora
from rlhf.models import lora
from rlhf.models.graphs import BodyGraphs
from rlhf.models.outputs import response_logprobs
from rlhf.training import sft

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TASKS = {"packed": sft.task(PAD, WIDTH), "padded": sft.task(PAD)}


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


def loss(model, rows, how="packed"):
    return TASKS[how].loss(model, TASKS[how].arrange(rows)) / TASKS[how].terms(rows)


def gradients(model, rows, how="packed"):
    """Return the loss, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    found = loss(model, rows, how)
    found.backward()
    return found.item(), vector(model)


def vector(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def logprobs(model, rows, how="packed"):
    """Return the log-probs of all responses, computed without gradients."""
    batch, labels = (part.to("cuda") for part in TASKS[how].arrange(rows))
    with torch.no_grad():
        return response_logprobs(model, batch, labels)


def agree(ours, theirs, off=0.02):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < off


@pytest.mark.parametrize("how", TASKS)
@pytest.mark.parametrize("adapters", [False, True])
def test_graphs_give_the_losses_and_gradients_of_the_plain_path(model, adapters, how):
    model, off = trained(model, adapters), {"packed": 0.02, "padded": 0.06}[how]
    plain = [gradients(model, rows, how) for rows in batches()]
    model.body_graphs = BodyGraphs(model)
    for rows, theirs in zip(batches(), plain, strict=True):
        agree(gradients(model, rows, how), theirs, off)
    assert len(model.body_graphs.graphs) > 1
    for rows, theirs in zip(batches(), plain, strict=True):  # replayed, none is captured again
        agree(gradients(model, rows, how), theirs, off)


def test_graphs_use_weights_as_they_are_and_add_gradients_up(model):
    model = trained(model, adapters=False)
    first, second = batches()[1:3]
    model.body_graphs = BodyGraphs(model)
    gradients(model, first), gradients(model, second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    by_graph = [gradients(model, rows) for rows in (first, second)]
    loss(model, first).backward()
    both = vector(model)
    model.body_graphs = None
    plain = [gradients(model, rows) for rows in (first, second)]
    for ours, theirs in zip(by_graph, plain, strict=True):
        agree(ours, theirs)
    agree((0.0, both), (0.0, plain[0][1] + plain[1][1]))


@pytest.mark.parametrize("how", TASKS)
def test_without_gradients_with_adapters_and_without_them(model, how):
    model = trained(model, adapters=True)
    rows = batches()[0]

    def both():
        with lora.adapters_disabled(model):
            reference = logprobs(model, rows, how)
        return logprobs(model, rows, how), reference

    plain = both()
    model.body_graphs = BodyGraphs(model)
    for _ in range(2):
        for ours, theirs in zip(both(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.01)
    assert (plain[0] - plain[1]).abs().max() > 0.1
    assert {shape.learns for shape in model.body_graphs.graphs} == {False, True}


def test_models_share_memory_without_disturbing_each_other(model):
    first, second = trained(model, adapters=False), trained(copy.deepcopy(model), adapters=True)
    frozen = copy.deepcopy(model).requires_grad_(False)
    rows = batches()
    plain = [(gradients(first, r), gradients(second, r), logprobs(frozen, r)) for r in rows]
    for each in (first, second, frozen):
        each.body_graphs = BodyGraphs(each)
    for _ in range(2):
        for r, (ours, others, theirs) in zip(rows, plain, strict=True):
            agree(gradients(first, r), ours)
            torch.testing.assert_close(logprobs(frozen, r), theirs, atol=0.03, rtol=0.01)
            agree(gradients(second, r), others)
