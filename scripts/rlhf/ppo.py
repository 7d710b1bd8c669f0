"""Step 3: PPO. The loop, readable from top to bottom; formulae in `ppo_math`, checklist in
DECISIONS.md.

Letters: B rollout batch, A tokens of a response. All means are over tokens of a whole mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf import engine, jsonl, order, ppo_math, rollout
from rlhf.batch import exact_div, plan_batch, rlhf_iterations
from rlhf.config import Rlhf, Run
from rlhf.errors import DataError
from rlhf.generation import Sampling
from rlhf.metrics import Metrics, Values, significant
from rlhf.models import response_logits, token_logprobs, token_values
from rlhf.progress import progress
from rlhf.rollout import Models, Rollout
from rlhf.rows import Rows
from rlhf.state import State
from rlhf.tokens import Padded


@dataclass(frozen=True)
class Targets:
    """What a rollout asks of actor and critic, all (B, A)."""

    advantages: Tensor  # whitened over the rollout
    returns: Tensor


@dataclass
class Controller:
    """What the loop remembers between iterations; saved with every state."""

    score_mean: float
    score_sd: float
    kl_coef: float


def train(
    models: Models, config: Rlhf, run: Run, sampling: Sampling, seed: int,
    data: Path, work: Path, board: Path,
) -> tuple[Values, Metrics]:  # fmt: skip
    """Train `models.actor` and `models.critic` in place, from the newest state if there is one.

    Returns:
        the means over the last tenth of the iterations, and the metrics of all.
    """
    state = State(work, {})
    state.lock()
    prompts = Rows(data / "train")
    iterations = rlhf_iterations(config, len(prompts))
    batch = plan_batch(exact_div(config.rollout_batch_size, config.mini_batches, "mini-batch"), run)
    steps = iterations * config.ppo_epochs * config.mini_batches
    actor = engine.initialise(models.actor, config.actor, batch, config.dtype, steps)
    critic = engine.initialise(models.critic, config.critic, batch, config.dtype, steps)
    state.engines |= {"actor": actor, "critic": critic}
    models = Models(actor.module, critic.module, models.reference, models.reward)
    found = state.load()
    done = found[0] if found else 0
    control = Controller(**found[1]) if found else _calibrate(models, config, run, sampling, seed, prompts)
    metrics = Metrics(work, board, done)
    bar = progress(range(done, iterations), "PPO", unit="iteration", start=done, total=iterations)
    for iteration in bar:
        # 1. Replies to the next prompts, and what all models say of them.
        first = iteration * config.rollout_batch_size
        chosen = order.stream(len(prompts), seed, first, config.rollout_batch_size)
        made = rollout.reply(
            models.actor, [prompts[int(i)][0] for i in chosen], sampling, seed, rollout.ROLLOUT, first
        )
        seen = rollout.observe(models, made, config.temperature, run.micro_batch_size)
        # 2. Rewards and advantages.
        targets, values = _targets(seen, config, control, np.random.default_rng([seed, 3, iteration]))
        # 3. Several optimizer steps on both models.
        values |= _update(actor, critic, seen, targets, config, run, [seed, 4, iteration])
        # 4. Controller, metrics, state.
        if config.kl_target is not None:
            control.kl_coef = ppo_math.next_kl_coef(
                control.kl_coef, values["kl_ref"], config.kl_target,
                config.rollout_batch_size, config.kl_horizon,
            )  # fmt: skip
        metrics.log(iteration + 1, values)
        bar.set_postfix({n: f"{values[n]:.3g}" for n in ("score", "kl_ref", "length")})
        if (iteration + 1) % run.save_steps == 0 or iteration + 1 == iterations:
            state.save(iteration + 1, vars(control))
    return _summary(metrics.path, iterations), metrics


def _calibrate(
    models: Models, config: Rlhf, run: Run, sampling: Sampling, seed: int, prompts: Rows
) -> Controller:
    """Find the reward model's mean and sd over replies of the SFT model, which the actor still is."""
    chosen = order.stream(len(prompts), seed, 0, config.reward_samples)
    raw = []
    for part in rollout.micro_batches(config.reward_samples, config.rollout_batch_size):
        rows = [prompts[int(i)][0] for i in chosen[part]]
        made = rollout.reply(models.actor, rows, sampling, seed, rollout.CALIBRATION, part.start)
        raw.append(rollout.observe(models, made, config.temperature, run.micro_batch_size).scores)
    scores = torch.cat(raw)
    if not scores.std() > 0:
        raise DataError(f"the reward model gives every reply the same score, {float(scores[0])}")
    return Controller(float(scores.mean()), float(scores.std()), config.kl_coef)


def _targets(
    seen: Rollout, config: Rlhf, control: Controller, rng: np.random.Generator
) -> tuple[Targets, Values]:
    """Return advantages and returns of a rollout, and its metrics."""
    mask = seen.response_mask
    normalised = (seen.scores - control.score_mean) / control.score_sd
    finished = normalised - config.missing_eos_penalty * ~seen.ended
    clipped = finished.clamp(-config.reward_clip, config.reward_clip)
    if config.shuffle_scores:
        clipped = clipped[torch.from_numpy(rng.permutation(len(clipped))).to(clipped.device)]
    kl = (seen.old_logprobs - seen.ref_logprobs) * mask
    rewards = ppo_math.shape_rewards(kl, clipped, mask, control.kl_coef)
    advantages, returns = ppo_math.gae(rewards, seen.values, mask, config.gamma, config.gae_lambda)
    values = {
        "score": normalised.mean(),
        "score_raw": seen.scores.mean(),
        "rlhf_reward": rewards.sum(-1).mean(),
        "non_score_reward": (-control.kl_coef * kl).sum(-1).mean(),
        "kl_ref": kl.sum(-1).mean(),
        "kl_coef": control.kl_coef,
        "length": mask.sum(-1).float().mean(),
        "ended": seen.ended.float().mean(),
        "value": ppo_math.masked_mean(seen.values, mask),
        "explained_variance": ppo_math.explained_variance(seen.values, returns, mask),
    }
    return Targets(ppo_math.whiten(advantages, mask), returns), _floats(values)


def _update(
    actor: Any, critic: Any, seen: Rollout, targets: Targets, config: Rlhf, run: Run, seed: list[int]
) -> Values:
    """Pass `ppo_epochs` times over a rollout in shuffled mini-batches; return mean metrics."""
    size = exact_div(len(seen.ended), config.mini_batches, "mini-batches of a rollout")
    history: list[Values] = []
    for epoch in range(config.ppo_epochs):
        shuffled = torch.from_numpy(np.random.default_rng([*seed, epoch]).permutation(len(seen.ended)))
        for part in rollout.micro_batches(len(shuffled), size):
            rows = shuffled[part].to(seen.ended.device).split(run.micro_batch_size)
            tokens = sum(int(seen.response_mask[r].sum()) for r in rows)
            parts: list[Values] = []
            rates = {"actor_learning_rate": actor.get_lr()[0]}
            norms = {
                "actor_grad_norm": engine.optimise(
                    actor, (_actor_loss(actor.module, seen, targets, r, config, tokens, parts) for r in rows)
                ),
                "critic_grad_norm": engine.optimise(
                    critic,
                    (_critic_loss(critic.module, seen, targets, r, config, tokens, parts) for r in rows),
                ),
            }
            sums = {name: sum(p[name] for p in parts if name in p) for p in parts for name in p}
            history.append({**sums, **norms, **rates})
    means = {name: float(np.mean([h[name] for h in history])) for name in history[0]}
    return means | {
        "ratio_max": max(h["ratio_mean"] for h in history),
        "first_approx_kl": history[0]["approx_kl"],
    }


def _actor_loss(
    model: Any, seen: Rollout, targets: Targets, rows: Tensor, config: Rlhf, tokens: int,
    parts: list[Values],
) -> Tensor:  # fmt: skip
    """Return a micro-batch's part of the policy loss; add its part of the metrics to `parts`."""
    batch, mask = Padded(seen.batch.ids[rows], seen.batch.mask[rows]), seen.response_mask[rows]
    length = mask.shape[1]
    logits = response_logits(model, batch, length, config.temperature)
    logratio = (token_logprobs(logits, batch.ids[:, -length:]) - seen.old_logprobs[rows]) * mask
    losses = ppo_math.policy_loss(logratio, targets.advantages[rows], config.clip_range)
    loss = (losses * mask).sum() / tokens
    with torch.no_grad():
        ratio = logratio.exp()
        per_token = {
            "policy_loss": losses,
            "entropy": ppo_math.entropy(logits),
            "approx_kl": ppo_math.approx_kl(logratio),
            "ratio_mean": ratio,
            "ratio_variance": (ratio - 1) ** 2,
            "clip_fraction": ((ratio - 1).abs() > config.clip_range).float(),
        }
        parts.append({name: float((x * mask).sum() / tokens) for name, x in per_token.items()})
    return loss


def _critic_loss(
    model: Any, seen: Rollout, targets: Targets, rows: Tensor, config: Rlhf, tokens: int,
    parts: list[Values],
) -> Tensor:  # fmt: skip
    """Return a micro-batch's part of the value loss; add its part of the metrics to `parts`."""
    batch, mask = Padded(seen.batch.ids[rows], seen.batch.mask[rows]), seen.response_mask[rows]
    values = token_values(model, batch)[:, -mask.shape[1] - 1 : -1]
    losses = ppo_math.value_loss(values, seen.values[rows], targets.returns[rows], config.value_clip_range)
    loss = (losses * mask).sum() / tokens
    outside = (values - seen.values[rows]).abs() > config.value_clip_range
    parts.append({
        "value_loss": float(loss.detach()),
        "value_clip_fraction": float((outside * mask).sum() / tokens),
    })  # fmt: skip
    return loss


def _floats(values: dict[str, Any]) -> Values:
    return {name: float(value) for name, value in values.items()}


def _summary(metrics: Path, iterations: int) -> Values:
    """Return the means of the last tenth of the iterations."""
    lines = list(jsonl.read(metrics))[-max(1, iterations // 10) :]
    return {n: significant(sum(line[n] for line in lines) / len(lines)) for n in lines[0] if n != "step"}
