"""Log-probabilities by a kernel: the values, entropies and gradients of torch."""

from __future__ import annotations

import pytest
import torch

from rlhf.models import outputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 5), (7, 4096), (33, 50272), (0, 9)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kernel_computes_what_torch_does(dtype, count, vocabulary, temperature):
    from rlhf.models import kernels  # it needs Triton

    torch.manual_seed(0)
    logits = (4 * torch.randn(count, vocabulary, device="cuda")).to(dtype).requires_grad_()
    tokens = torch.randint(vocabulary, (count,), device="cuda")
    weights = torch.randn(count, device="cuda")
    wide = logits.float() / temperature
    expected = outputs.token_logprobs(wide, tokens)
    (expected * weights).sum().backward()
    ours = logits.detach().clone().requires_grad_()
    found, entropies = kernels.logprobs(ours * 1, tokens, temperature)  # not a leaf, which cannot be written
    (found * weights).sum().backward()
    close = torch.testing.assert_close
    close(found, expected.detach(), atol=1e-4, rtol=1e-4)
    close(entropies, outputs.entropy(wide.detach()), atol=1e-4, rtol=1e-4)
    close(ours.grad.float(), logits.grad.float(), atol=2e-6 if dtype == torch.float32 else 1e-3, rtol=1e-2)
    assert not entropies.requires_grad


def test_what_is_impossible_has_no_part():
    from rlhf.models import kernels

    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]], device="cuda")
    found, entropies = kernels.logprobs(logits, torch.tensor([2], device="cuda"), 1.0)
    two = torch.full((1,), 2.0, device="cuda").log()
    torch.testing.assert_close((-found, entropies), (two, two))
