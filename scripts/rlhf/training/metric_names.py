"""The metrics of PPO, which `metrics.jsonl` has for every iteration: name -> meaning.

The main metrics come first, also in `curves.png`. KL and entropy are in nats.
"""

from __future__ import annotations

PPO_METRICS = {
    "score": "the reward model's score, normalised by mean and sd over the SFT model's responses",
    "kl_ref": "KL to the SFT model, summed over a response's tokens",
    "length": "tokens of a response",
    "rlhf_reward": "what PPO maximises: the clipped score with its penalty, plus non_score_reward",
    "entropy": "entropy of the policy, mean over tokens",
    "value_loss": "clipped squared error of the critic, halved",
    "explained_variance": "1 - var(returns - values) / var(returns); 1 is a perfect critic",
    "policy_loss": "clipped surrogate loss",
    "score_raw": "the score before normalisation",
    "non_score_reward": "minus kl_coef times kl_ref",
    "kl_coef": "coefficient of the KL penalty",
    "ended": "share of responses that end with EOS",
    "score_length_correlation": "Pearson's correlation of score and length",
    "value": "the critic's value, mean over tokens",
    "sampler_kl": "KL of the trainer from the sampler, which have the same weights, by k3, mean over tokens",
    "sampler_diff": "difference of their log-probs, mean over tokens",
    "sampler_diff_max": "the largest difference",
    "sampler_outside": "share of tokens whose ratio of trainer to sampler is outside [0.5, 2]",
    "sampler_ess": "effective share of the sample under these ratios: 1 where they agree",
    "approx_kl": "KL of the policy from the rollout's, by k3, mean over mini-batches",
    "first_approx_kl": "approx_kl of the first mini-batch, before any update: 0 but for rounding",
    "ratio_mean": "ratio of the policy to the rollout's, mean over tokens",
    "ratio_mean_max": "the largest mini-batch's ratio_mean",
    "ratio_variance": "mean of (ratio - 1)^2",
    "clip_fraction": "share of tokens whose ratio is beyond clip_range",
    "value_clip_fraction": "share of values beyond value_clip_range around the rollout's",
    "actor_grad_norm": "norm of the actor's gradient before clipping",
    "critic_grad_norm": "norm of the critic's gradient before clipping",
    "actor_learning_rate": "learning rate of the actor's first parameter group",
    "ptx_loss": "the SFT stage's loss per token, where ptx_coef is set",
}
MAIN = ("loss", *list(PPO_METRICS)[:7])  # drawn first; `loss` is the other stages'
