"""Flat parameters: a model in a `FlatForward` has the losses, gradients and updates of the plain model."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import trainings

from rlhf.config.training import Lora
from rlhf.models import lora
from rlhf.training import engine, sft, wrapped

TASK = sft.task(trainings.PAD)
ROWS = [[list(range(3, 9)), [5, 6, 2]], [[7, 8], [9, 10, 11, 2]]]


def models(name, adapters):
    """Return a model and its copy."""
    model = families.tiny(name)  # in evaluation mode: without dropout
    if adapters:
        lora.add(model, Lora(dim=4, alpha=4.0, learning_rate=1.0), seed=1)
        for layer in lora.layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model, copy.deepcopy(model)


def flattened(model, monkeypatch, largest):
    monkeypatch.setattr(wrapped, "LARGEST", largest)
    optimizer = trainings.settings("sft", {}).optimizer
    only = Lora(dim=4, alpha=4.0, learning_rate=1.0) if lora.layers(model) else None
    groups = engine._parameter_groups(model, optimizer, only)
    return wrapped.FlatForward(model, groups), groups


@pytest.mark.parametrize("largest", [1, 5000, 10**9])
@pytest.mark.parametrize(("name", "adapters"), [("opt", False), ("llama", True), ("gpt-neox", False)])
def test_losses_gradients_and_updates_are_those_of_the_plain_model(monkeypatch, name, adapters, largest):
    model, plain = models(name, adapters)
    flat, groups = flattened(model, monkeypatch, largest)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in flat.parameters()}
    learned = [p for p in plain.parameters() if p.requires_grad]
    assert len(flat.flat) == len(learned) if largest == 1 else len(flat.flat) < len(learned)
    for module, wrap in ((flat, flat), (plain, wrapped.SingleForward(plain))):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module.loss = wrap(TASK.loss, TASK.arrange(ROWS))
            module.loss.backward()
            optimizer.step()
    torch.testing.assert_close(flat.loss, plain.loss)
    assert all(p.grad is None for p in model.parameters())
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(flat(TASK.loss, TASK.arrange(ROWS)), plain_loss(plain))


def plain_loss(model):
    return trainings.loss(TASK, model, ROWS)


def test_a_part_that_a_loss_does_not_use_gets_zeros(monkeypatch):
    model, _ = models("opt", adapters=False)
    flat, _ = flattened(model, monkeypatch, 10**9)
    flat(lambda m: m.get_input_embeddings().weight.sum()).backward()
    used = model.get_input_embeddings().weight.numel()
    assert sum(float(p.grad.sum()) for p in flat.flat if p.grad is not None) == used


def test_the_mode_is_the_models(monkeypatch):
    model, _ = models("opt", adapters=False)
    flat, _ = flattened(model, monkeypatch, 10**9)
    flat.eval()
    assert not model.training
    flat.train()
    assert model.training
