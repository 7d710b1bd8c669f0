"""Step 3: PPO. The loop, readable from top to bottom; formulae in `ppo_math`, checklist in
DECISIONS.md.

Letters: B rollout batch, A tokens of a response. All means are over tokens of a whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf import engine, jsonl, lora, order, ppo_math, reference, rollout
from rlhf.batch import exact_div, plan_batch, rlhf_iterations
from rlhf.config import Rlhf
from rlhf.ema import Ema
from rlhf.errors import DataError
from rlhf.generation import Sampling
from rlhf.health import Health
from rlhf.metrics import Metrics, Values, significant
from rlhf.models import load_actor, load_scorer, response_logits, response_values
from rlhf.parallel import own, rank, total
from rlhf.progress import progress
from rlhf.ptx import Ptx
from rlhf.rollout import Models, Rollout
from rlhf.rows import Rows
from rlhf.state import State
from rlhf.streams import Purpose, rng, seed_of
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


@dataclass(frozen=True)
class Learner:
    """What an optimizer step works on."""

    models: Models
    config: Rlhf
    ema: Ema | None
    ptx: Ptx | None


def load(actor: Path, scorer: Path, config: Rlhf) -> Models:
    """Load the four models, bare, spread out as `config.run` says; all processes call it.

    Args:
        actor: directory of the SFT actor, the reference too.
        scorer: directory of the reward model, from which the critic starts.
    """
    run, dtype, name = config.run, engine.DTYPES[config.dtype], config.dtype
    sharded, offloads = run.zero_stage == 3, "reference" in run.offload
    with engine.loading(actor, name, sharded=sharded):
        policy = load_actor(actor, dtype)
    with engine.loading(actor, name, sharded=sharded or offloads, offloads=offloads):
        frozen = None if reference.is_bare_actor(config.actor_lora) else load_actor(actor, dtype)
    with engine.loading(scorer, name, sharded=sharded):
        critic, reward = (load_scorer(scorer, dtype) for _ in range(2))
    return Models(policy, critic, frozen, reward)


def train(
    models: Models, config: Rlhf, sampling: Sampling, seed: int, data: Mapping[str, Path],
    work: Path, board: Path,
) -> tuple[Values, Metrics, Ema | None]:  # fmt: skip
    """Train `models.actor` and `models.critic`, bare models, in place, from the newest state if there is one.

    Args:
        data: `data`: the prompts; `ptx`: rows of step 1, where `ptx_coef` is set.
    Returns:
        the means over the last tenth of the iterations (rank 0), the metrics of all, and the mean of
        the actor's weights where `ema_decay` is set.
    """
    run, prompts = config.run, Rows(data["data"] / "train")
    state = State(work, run.cut)
    state.lock()
    iterations = rlhf_iterations(config, len(prompts))
    learner = _learner(models, config, iterations, sampling.pad_id, seed, data, state)
    models = learner.models
    found = state.load()
    done = found[0] if found else 0
    control = Controller(**found[1]) if found else _calibrate(models, config, sampling, seed, prompts)
    metrics, health = Metrics(work, board, done), Health()
    bar = progress(range(done, iterations), "step 3, PPO", unit="iteration", start=done, total=iterations)
    for iteration in bar:
        # 1. Replies to the next prompts, and what all models say of them.
        first = iteration * config.rollout_batch_size
        chosen = order.stream(len(prompts), seed, first, config.rollout_batch_size)
        asked = [prompts[int(i)][0] for i in chosen]
        seen = rollout.roll_out(models, asked, sampling, seed, Purpose.ROLLOUT, first, run)
        # 2. Rewards and advantages.
        targets, values = _targets(seen, config, control, rng(seed, Purpose.SHUFFLED_SCORES, iteration))
        # 3. Several optimizer steps on both models.
        values |= _update(learner, seen, targets, iteration, seed)
        # 4. Controller, metrics, state.
        if config.kl_target is not None:
            control.kl_coef = ppo_math.next_kl_coef(
                control.kl_coef, values["kl_ref"], config.kl_target,
                config.rollout_batch_size, config.kl_horizon,
            )  # fmt: skip
        metrics.log(iteration + 1, values)
        if rank() == 0:
            health.look(iteration + 1, values)
        if (iteration + 1) % run.log_steps == 0:
            bar.set_postfix({n: f"{values[n]:.3g}" for n in ("score", "kl_ref", "length")})
        if (iteration + 1) % run.save_steps == 0 or iteration + 1 == iterations:
            state.save(iteration + 1, vars(control))
    return _summary(metrics.path, iterations) if rank() == 0 else {}, metrics, learner.ema


def _learner(
    models: Models, config: Rlhf, iterations: int, pad_id: int, seed: int, data: Mapping[str, Path],
    state: State,
) -> Learner:  # fmt: skip
    """Return engines or roots around the four bare models and what goes with them; `state` knows them."""
    run, size = config.run, exact_div(config.rollout_batch_size, config.mini_batches, "mini-batch")
    batch, steps = plan_batch(size, run), iterations * config.ppo_epochs * config.mini_batches
    ptx = None
    if config.ptx_coef is not None:
        rows = Rows(data["ptx"] / "train")
        ptx = Ptx(rows, config.ptx_coef, pad_id, seed, size, steps, run.micro_batch_size)
    # With PTX an optimizer step of the actor has as many micro-batches again.
    both = batch if ptx is None else replace(
        batch, train_batch_size=2 * size, grad_accum_steps=2 * batch.grad_accum_steps
    )  # fmt: skip
    if config.actor_lora:
        lora.add(models.actor, config.actor_lora, seed_of(seed, Purpose.LORA))
    if config.critic_lora:
        lora.add(models.critic, config.critic_lora, seed_of(seed, Purpose.CRITIC_LORA))
    dtype, offloads, unchanged = config.dtype, "reference" in run.offload, models.reference
    engines = Models(
        engine.initialise(models.actor, config.actor, config.actor_lora, both, dtype, steps, run),
        engine.initialise(models.critic, config.critic, config.critic_lora, batch, dtype, steps, run),
        None if unchanged is None else engine.frozen(unchanged, dtype, offloads=offloads),
        engine.frozen(models.reward, dtype),
    )
    ema = None if config.ema_decay is None else Ema(models.actor, config.ema_decay)
    state.engines |= {"actor": engines.actor, "critic": engines.critic}
    if ema:
        state.tensors["ema"] = ema.means
        state.shared |= set() if ema.is_sharded else {"ema"}
    return Learner(engines, config, ema, ptx)


def _calibrate(models: Models, config: Rlhf, sampling: Sampling, seed: int, prompts: Rows) -> Controller:
    """Find the reward model's mean and sd over replies of the SFT model, which the actor still is."""
    chosen = order.stream(len(prompts), seed, 0, config.reward_samples)
    raw = []
    for part in rollout.micro_batches(config.reward_samples, config.rollout_batch_size):
        rows = [prompts[int(i)][0] for i in chosen[part]]
        purpose = Purpose.CALIBRATION
        raw.append(rollout.roll_out(models, rows, sampling, seed, purpose, part.start, config.run).scores)
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
        "score_length_correlation": ppo_math.correlation(seen.scores, mask.sum(-1).float()),
        "value": ppo_math.masked_mean(seen.values, mask),
        "explained_variance": ppo_math.explained_variance(seen.values, returns, mask),
    }
    return Targets(ppo_math.whiten(advantages, mask), returns), _floats(values)


def _update(learner: Learner, seen: Rollout, targets: Targets, iteration: int, seed: int) -> Values:
    """Pass `ppo_epochs` times over a rollout in shuffled mini-batches; return mean metrics."""
    config = learner.config
    size = exact_div(len(seen.ended), config.mini_batches, "mini-batches of a rollout")
    history: list[Values] = []
    for epoch in range(config.ppo_epochs):
        noise = rng(seed, Purpose.MINI_BATCHES, iteration, epoch)
        shuffled = torch.from_numpy(noise.permutation(len(seen.ended)))
        for part in rollout.micro_batches(len(shuffled), size):
            number = iteration * config.ppo_epochs * config.mini_batches + len(history)
            history.append(_step(learner, seen, targets, shuffled[part].to(seen.ended.device), number))
    means = {name: float(np.mean([h[name] for h in history])) for name in history[0]}
    return means | {
        "ratio_mean_max": max(h["ratio_mean"] for h in history),
        "first_approx_kl": history[0]["approx_kl"],
    }


def _step(learner: Learner, seen: Rollout, targets: Targets, chosen: Tensor, number: int) -> Values:
    """Do one optimizer step on both models over a mini-batch; return its metrics.

    Replies of like length share a micro-batch, and processes share micro-batches. What is divided by
    are the tokens of the whole mini-batch, so that neither changes the gradient.
    """
    actor, critic, config = learner.models.actor, learner.models.critic, learner.config
    grouped = rollout.by_length(seen.batch, chosen, config.run.micro_batch_size)
    tokens = int(seen.response_mask[chosen].sum())
    parts = [_part(seen, targets, rows, tokens) for rows in own(grouped)]
    mine: list[Values] = []
    rates = {"actor_learning_rate": actor.get_lr()[0]}
    # Bound, not handed over: ZeRO-3's hooks copy lists among a forward's arguments.
    policy = (actor(partial(_actor_loss, part=p, config=config, metrics=mine)) for p in parts)
    imitation = learner.ptx.losses(actor, number, mine) if learner.ptx else ()
    value = (critic(partial(_critic_loss, part=p, config=config, metrics=mine)) for p in parts)
    norms = {
        "actor_grad_norm": engine.optimise(actor, chain(policy, imitation)),
        "critic_grad_norm": engine.optimise(critic, value),
    }
    if learner.ema:
        learner.ema.update()
    names = dict.fromkeys(name for values in mine for name in values)
    sums = total({name: sum(values.get(name, 0.0) for values in mine) for name in names})
    return {**sums, **norms, **rates}


@dataclass(frozen=True)
class Part:
    """A micro-batch of a mini-batch, as models read it, and what was seen and is asked of its N reply tokens."""

    batch: Padded  # (B, T)
    replies: Tensor  # (B, T) bool; True at N tokens
    old_logprobs: Tensor  # (N,)
    old_values: Tensor  # (N,)
    advantages: Tensor  # (N,)
    returns: Tensor  # (N,)
    tokens: int  # of replies, in the whole mini-batch


def _part(seen: Rollout, targets: Targets, rows: Tensor, tokens: int) -> Part:
    mask = seen.response_mask[rows]
    columns = (seen.old_logprobs, seen.values, targets.advantages, targets.returns)
    return Part(
        *rollout.as_read(seen.batch, seen.response_mask, rows), *(c[rows][mask] for c in columns), tokens
    )


def _actor_loss(model: Any, part: Part, config: Rlhf, metrics: list[Values]) -> Tensor:
    """Return a micro-batch's part of the policy loss; add its part of the metrics to `metrics`."""
    logits = response_logits(model, part.batch, part.replies, config.temperature)
    logprobs = logits.log_softmax(-1)
    logratio = logprobs.gather(-1, part.batch.ids[part.replies][:, None])[:, 0] - part.old_logprobs
    losses = ppo_math.policy_loss(logratio, part.advantages, config.clip_range)
    with torch.no_grad():
        ratio = logratio.exp()
        per_token = {
            "policy_loss": losses,
            "entropy": ppo_math.entropy(logprobs),
            "approx_kl": ppo_math.approx_kl(logratio),
            "ratio_mean": ratio,
            "ratio_variance": (ratio - 1) ** 2,
            "clip_fraction": ((ratio - 1).abs() > config.clip_range).float(),
        }
        metrics.append({name: float(x.sum() / part.tokens) for name, x in per_token.items()})
    return losses.sum() / part.tokens


def _critic_loss(model: Any, part: Part, config: Rlhf, metrics: list[Values]) -> Tensor:
    """Return a micro-batch's part of the value loss; add its part of the metrics to `metrics`."""
    values = response_values(model, part.batch, part.replies)
    losses = ppo_math.value_loss(values, part.old_values, part.returns, config.value_clip_range)
    loss = losses.sum() / part.tokens
    outside = (values - part.old_values).abs() > config.value_clip_range
    metrics.append({
        "value_loss": float(loss.detach()),
        "value_clip_fraction": float(outside.sum() / part.tokens),
    })  # fmt: skip
    return loss


def _floats(values: dict[str, Any]) -> Values:
    return {name: float(value) for name, value in values.items()}


def _summary(metrics: Path, iterations: int) -> Values:
    """Return the means of the last tenth of the iterations."""
    lines = list(jsonl.read(metrics))[-max(1, iterations // 10) :]
    return {n: significant(sum(line[n] for line in lines) / len(lines)) for n in lines[0] if n != "step"}
