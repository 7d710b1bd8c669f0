from __future__ import annotations

import math

import pytest
import torch

from rlhf.models import outputs
from rlhf.training import ppo_math

B, A = 5, 7
LENGTHS = torch.tensor([7, 1, 4, 6, 2])
MASK = torch.arange(A) < LENGTHS[:, None]
SEEDS = range(3)


def noise(seed, *shape):
    return torch.randn(*(shape or (B, A)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def garbage(x):
    """Return `x` with other values outside the mask."""
    return torch.where(MASK, x, torch.full_like(x, 1e4))


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, check_dtype=False, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_values_have_mean_0_and_variance_1_over_the_mask(seed):
    whitened = ppo_math.whiten(7 + 3 * noise(seed), MASK)
    close(whitened[MASK].mean(), torch.tensor(0.0))
    close(whitened[MASK].var(unbiased=False), torch.tensor(1.0), atol=1e-6)
    assert (whitened[~MASK] == 0).all()


def test_whitening_ignores_shift_and_scale():
    x = noise(0)
    close(ppo_math.whiten(5 * x - 100, MASK), ppo_math.whiten(x, MASK), atol=1e-6)


def test_equal_values_whiten_to_0():
    close(ppo_math.whiten(torch.full((B, A), 3.0), MASK), torch.zeros(B, A))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(seed, gamma, gae_lambda):
    rewards, values = noise(seed) * MASK, noise(seed + 100)
    advantages, returns = ppo_math.gae(rewards, values, MASK, gamma, gae_lambda)
    for b in range(B):
        n = int(LENGTHS[b])
        following = [*values[b, 1:n].tolist(), 0.0]
        errors = [rewards[b, t] + gamma * following[t] - values[b, t] for t in range(n)]
        for t in range(n):
            slow = sum((gamma * gae_lambda) ** (k - t) * errors[k] for k in range(t, n))
            close(advantages[b, t], slow)
    close(returns, (advantages + values) * MASK)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_discount_returns_are_rewards_to_go(seed):
    rewards = noise(seed) * MASK
    _, returns = ppo_math.gae(rewards, noise(seed + 1), MASK, 1.0, 1.0)
    close(returns, rewards.flip(-1).cumsum(-1).flip(-1) * MASK)


def test_with_lambda_0_an_advantage_depends_on_one_reward_only():
    values = noise(1)
    before, _ = ppo_math.gae(noise(0) * MASK, values, MASK, 0.9, 0.0)
    for t in range(A):
        rewards = noise(0) * MASK
        rewards[:, t] += 10
        after, _ = ppo_math.gae(rewards, values, MASK, 0.9, 0.0)
        changed = torch.zeros_like(MASK)
        changed[:, t] = MASK[:, t]
        close(after - before, 10.0 * changed)


def test_a_perfect_critic_leaves_no_advantage():
    rewards = noise(0) * MASK
    values = rewards.flip(-1).cumsum(-1).flip(-1)
    advantages, _ = ppo_math.gae(rewards, values, MASK, 1.0, 0.95)
    close(advantages, torch.zeros_like(advantages))


def test_values_of_padding_never_matter():
    x, y, scores = noise(0), noise(1), noise(2, B)
    for f in (
        lambda a, b: ppo_math.whiten(a, MASK),
        lambda a, b: ppo_math.masked_mean(a, MASK),
        lambda a, b: ppo_math.shape_rewards(a, scores, MASK, 0.3),
        lambda a, b: ppo_math.gae(a, b, MASK, 0.9, 0.8)[0],
        lambda a, b: ppo_math.gae(a, b, MASK, 0.9, 0.8)[1],
        lambda a, b: ppo_math.explained_variance(a, b, MASK),
    ):
        close(f(garbage(x), garbage(y)), f(x * MASK, y * MASK), rtol=1e-7)


def test_wider_padding_never_matters():
    x, scores = noise(0), noise(1, B)
    wide, mask = torch.cat([x, noise(2)], 1), torch.cat([MASK, torch.zeros_like(MASK)], 1)
    close(ppo_math.whiten(wide, mask)[:, :A], ppo_math.whiten(x, MASK))
    close(
        ppo_math.shape_rewards(wide, scores, mask, 0.1)[:, :A], ppo_math.shape_rewards(x, scores, MASK, 0.1)
    )
    close(ppo_math.gae(wide, wide, mask, 0.9, 0.9)[0][:, :A], ppo_math.gae(x, x, MASK, 0.9, 0.9)[0])


def test_the_score_lands_on_the_last_real_token():
    rewards = ppo_math.shape_rewards(torch.zeros(B, A), torch.arange(1.0, B + 1), MASK, 0.1)
    assert [row.nonzero().flatten().tolist() for row in rewards] == [[n - 1] for n in LENGTHS.tolist()]
    close(rewards.sum(-1), torch.arange(1.0, B + 1))


def test_the_kl_penalty_is_proportional_to_the_coefficient():
    kl, scores = noise(0) * MASK, noise(1, B)
    totals = [ppo_math.shape_rewards(kl, scores, MASK, c).sum(-1) for c in (0.0, 1.0, 2.0)]
    close(totals[0], scores)
    close(totals[0] - totals[1], kl.sum(-1))
    close(totals[0] - totals[2], 2 * kl.sum(-1))


def policy_gradient(ratio, advantage, clip_range=0.2):
    logratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    ppo_math.policy_loss(logratio, torch.tensor([[advantage]]), clip_range).sum().backward()
    return logratio.grad.item()


@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, 1.0), (5.0, 0.1), (0.7, -1.0), (0.01, -3.0)])
def test_outside_the_clip_range_the_gradient_is_0(ratio, advantage):
    assert policy_gradient(ratio, advantage) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage"), [(1.0, 1.0), (1.1, 1.0), (0.7, 1.0), (1.0, -1.0), (0.9, -1.0), (1.3, -1.0)]
)
def test_inside_the_clip_range_or_on_the_way_back_the_gradient_follows_the_advantage(ratio, advantage):
    assert policy_gradient(ratio, advantage) * advantage < 0


def test_the_first_step_follows_the_plain_policy_gradient():
    logratio = torch.zeros(B, A, dtype=torch.float64, requires_grad=True)
    advantages = noise(0)
    ppo_math.policy_loss(logratio, advantages, 0.2).sum().backward()
    close(logratio.grad, -advantages)


def test_clipping_never_makes_the_policy_loss_smaller():
    logratio, advantages = noise(0), noise(1)
    tight, loose = (ppo_math.policy_loss(logratio, advantages, c) for c in (0.1, 1e6))
    assert (tight >= loose).all()


def test_the_value_loss_is_0_at_the_return_and_clipping_never_makes_it_smaller():
    values, returns = noise(0), noise(1)
    assert (ppo_math.value_loss(returns, returns, returns, 0.2) == 0).all()
    tight, loose = (ppo_math.value_loss(values, noise(2), returns, c) for c in (0.1, 1e6))
    assert (tight >= loose - 1e-9).all()
    close(loose * 4, ppo_math.value_loss(2 * values, noise(2), 2 * returns, 1e6))


@pytest.mark.parametrize(("value", "moves"), [(0.1, True), (0.5, False), (-0.5, True), (2.0, True)])
def test_a_value_outside_its_clip_range_has_no_gradient_towards_the_return(value, moves):
    values = torch.tensor([[value]], requires_grad=True)
    ppo_math.value_loss(values, torch.zeros(1, 1), torch.tensor([[1.0]]), 0.2).sum().backward()
    assert (values.grad.item() != 0) == moves


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_estimate_is_never_negative_and_0_for_equal_policies(seed):
    assert (ppo_math.approx_kl(3 * noise(seed)) >= 0).all()
    assert (ppo_math.approx_kl(torch.zeros(B, A)) == 0).all()


def test_the_kl_estimate_is_unbiased():
    old, new = noise(0, 9).log_softmax(-1), noise(1, 9).log_softmax(-1)
    exact = torch.nn.functional.kl_div(new, old, log_target=True, reduction="sum")
    close((old.exp() * ppo_math.approx_kl(new - old)).sum(), exact)


def test_entropy_is_largest_when_uniform_and_0_when_certain():
    uniform, certain = torch.zeros(1, 1, 16), torch.eye(16)[:1, None] * 1e4
    close(outputs.entropy(uniform), torch.full((1, 1), math.log(16)), atol=1e-6)
    close(outputs.entropy(certain), torch.zeros(1, 1))
    assert (outputs.entropy(noise(0, 2, 3, 16)) < math.log(16)).all()


def test_a_perfect_critic_explains_all_and_a_constant_one_nothing():
    returns = noise(0)
    close(ppo_math.explained_variance(returns + 3, returns, MASK), torch.tensor(1.0))
    close(ppo_math.explained_variance(torch.zeros(B, A), returns, MASK), torch.tensor(0.0))
    assert ppo_math.explained_variance(-returns, returns, MASK) < 0


def test_correlation_ignores_shift_and_scale():
    x, y = noise(0)[:, 0], noise(1)[:, 0]
    close(ppo_math.correlation(x, 3 * x + 1), torch.tensor(1.0))
    close(ppo_math.correlation(x, -x), torch.tensor(-1.0))
    close(ppo_math.correlation(x, y), torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert ppo_math.correlation(x, torch.ones(B)) == 0


def test_the_kl_coefficient_rises_above_the_target_and_falls_below_it():
    def after(kl):
        return ppo_math.next_kl_coef(0.2, kl, 6.0, 64, 10000)

    assert after(5.0) < after(5.9) < 0.2 == after(6.0) < after(6.1) < after(7.0)
    assert after(7.2) == pytest.approx(after(1000.0))
    assert after(-50.0) == after(0.0) > 0
