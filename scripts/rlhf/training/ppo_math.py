"""PPO's formulae: pure functions of tensors.

Numbers are float32, and results have the dtype of their arguments. Masks are bool, True where a token
counts; finite values outside a mask never change a result.

Letters: B batch, A tokens of the longest response, N tokens within a mask, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of float32 `x` where bool `mask`, of the same shape, is True: a float32 scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x`, (B, A) float32, shifted and scaled to mean 0 and variance 1 over `mask`; 0 elsewhere.

    `mask` is (B, A) bool.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def shape_rewards(kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return (B, A) float32 rewards: a penalty of KL at every token, the score at the last one.

    Args:
        kl: (B, A) float32, log pi(token) - log ref(token) of the rollout (k1).
        scores: (B,) float32, the score of the whole response.
        mask: (B, A) bool.

    Source: Ouyang et al. 2022, eq. 2; per token as in Ziegler et al. 2019, eq. 2.
    """
    rewards = -kl_coef * kl * mask
    last = mask.long().sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of response tokens, by generalised advantage estimation.

    Args:
        rewards: (B, A) float32, zero where mask is False.
        values: (B, A) float32, value of the state before each token.
        mask: (B, A) bool.

    Returns:
        advantages and returns, both (B, A) float32, not whitened, zero where mask is False.

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
    """Return each token's clipped surrogate loss: float32, of the shape of its two arguments, any shape.

    Source: Schulman et al. 2017, eq. 7.
    """
    ratio = logratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Return each value's loss: float32, of the shape of the three arguments, any shape.

    It is half the squared error of the value, or of the value clipped to `clip_range` around the rollout's,
    whichever is larger.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def approx_kl(logratio: Tensor) -> Tensor:
    """Return each token's estimate of KL(old, new), never negative (k3): float32, of the shape of `logratio`.

    Args:
        logratio: log new(token) - log old(token), float32 of any shape.

    Source: Schulman, "Approximating KL Divergence", 2020.
    """
    return logratio.exp() - 1 - logratio


def sampling_mismatch(sampled: Tensor, trained: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how the trainer's log-probabilities of a rollout's tokens differ from the sampler's.

    Both have the same weights, so that an error in a mask, a position, the cache or a weight shows here.

    Args:
        sampled: (B, A) float32, by the sampler, as each token was sampled.
        trained: (B, A) float32, by the training forward.
        mask: (B, A) bool.

    Returns:
        name of a metric -> float32 scalar.
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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - var(returns - values) / var(returns) over `mask`: a float32 scalar, 1 for a perfect critic.

    `values` and `returns` are (B, A) float32, `mask` is (B, A) bool.
    """
    error = returns - values
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - masked_mean((error - masked_mean(error, mask)) ** 2, mask) / total.clamp(min=1e-8)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two (B,) float32, a float32 scalar; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    pearson: Tensor = (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8)
    return pearson


def next_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Return the KL coefficient of the next iteration: larger if `kl` is above its target, else smaller.

    Args:
        kl: mean KL of this iteration's responses.
        samples: responses of an iteration.
        horizon: responses over which the coefficient changes by up to a fifth.

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)
