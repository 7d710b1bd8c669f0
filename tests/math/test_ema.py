from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf.models.ema import Ema


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_the_mean_is_the_weighted_sum_of_all_weights(model):
    ema, history = Ema(model, 0.9), [model[0].weight.detach().clone()]
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
        history.append(model[0].weight.detach().clone())
        ema.update()
    expected = 0.9**5 * history[0] + sum(0.1 * 0.9 ** (5 - k) * history[k] for k in range(1, 6))
    torch.testing.assert_close(ema.means["0.weight"], expected)


def test_weights_are_restored_after_the_mean_was_in_place(model):
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    ema.update()
    before = model[1].weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(model[1].weight.detach(), before - 0.5)
    assert torch.equal(model[1].weight, before)


def test_only_trained_weights_have_a_mean(model):
    model[0].requires_grad_(False)
    assert Ema(model, 0.5).means.keys() == {"1.weight", "1.bias"}


def test_small_changes_of_16_bit_weights_are_not_lost():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = Ema(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0078125)  # the next number that bf16 has
    ema.update()
    assert ema.means["weight"].item() == pytest.approx(1 + 0.0078125e-3, abs=1e-7)
