"""PPO's formulae: pure functions of tensors. Letters: B batch, A tokens of a response.

Masks are bool, True where a token counts; finite values outside a mask never change a result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` where `mask` is True, a scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale (B, A) to mean 0 and variance 1 over `mask`; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def shape_rewards(kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return (B, A) rewards: a penalty of KL at every token, the score at the last one.

    Args:
        kl: (B, A) log pi(token) - log ref(token) of the rollout (k1).
        scores: (B,) score of the whole response.
    Source: Ouyang et al. 2022, eq. 2; per token as in Ziegler et al. 2019, eq. 2.
    """
    rewards = -kl_coef * kl * mask
    last = mask.long().sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens.

    Args:
        rewards: (B, A), zero where mask is False.
        values: (B, A) value of the state before each token.
    Returns:
        advantages and returns, both (B, A), not whitened, zero where mask is False.
    Source: Schulman et al. 2016, eq. 16.
    """
    values = values * mask
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)  # the state after the last token is worth nothing
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages, advantages + values


def policy_loss(logratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return the clipped surrogate loss of each token, in any shape. Source: Schulman et al. 2017, eq. 7."""
    ratio = logratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Return half the squared error of each value, in any shape, values kept within `clip_range` of the rollout's."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def approx_kl(logratio: Tensor) -> Tensor:
    """Return each token's estimate of KL(old, new), in any shape, which is never negative (k3).

    Source: Schulman, "Approximating KL Divergence", 2020.
    """
    return logratio.exp() - 1 - logratio


def sampling_mismatch(sampled: Tensor, trained: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how the trainer's log-probabilities of a rollout's tokens differ from the sampler's; scalars.

    Both sides have the same weights: a mask, position, cache or weight that is wrong on one of them shows here.

    Args:
        sampled: (B, A) by the sampler, as each token was sampled.
        trained: (B, A) by the training forward.
    """
    logratio = (trained - sampled)[mask]  # (N,)
    ratio = logratio.exp()
    return {
        "sampler_kl": approx_kl(logratio).mean(),
        "sampler_diff": logratio.abs().mean(),
        "sampler_diff_max": logratio.abs().max(),
        "sampler_outside": ((ratio < 0.5) | (ratio > 2)).float().mean(),
        "sampler_ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy in nats of distributions, shape (...), from log-probabilities (..., V)."""
    return -(logprobs.exp() * logprobs).sum(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - var(returns - values) / var(returns) over `mask`, all (B, A); a scalar, 1 for a perfect critic."""
    error = returns - values
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - masked_mean((error - masked_mean(error, mask)) ** 2, mask) / total.clamp(min=1e-8)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two (B,); 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    pearson: Tensor = (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8)
    return pearson


def next_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Return the coefficient of the next iteration. Source: Ziegler et al. 2019, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)
