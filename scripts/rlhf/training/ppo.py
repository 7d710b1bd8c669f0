"""The PPO stage. The loop, readable from top to bottom; formulae are in `ppo_math`.

Letters: B rows of a rollout, b rows of a mini-batch or micro-batch, A tokens of the longest response,
T of prompt and response, V vocabulary, N response tokens of a micro-batch. Numbers in tensors are float32.
Means in losses are over the tokens of a whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf import jsonl, parallel
from rlhf.config import reference
from rlhf.config.batch import exact_div, plan_batch, rlhf_iterations, slices
from rlhf.config.stages import Rlhf
from rlhf.data import order
from rlhf.data.rows import Rows
from rlhf.data.streams import Purpose, Stream, rng, seed_of
from rlhf.data.tokens import Packed, Padded
from rlhf.errors import DataError
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Sampling
from rlhf.models import families, lora, packing
from rlhf.models.ema import Ema
from rlhf.models.graphs import use_graphs
from rlhf.models.loading import load_actor, load_scorer
from rlhf.models.outputs import response_logprobs_and_entropy, response_values
from rlhf.progress import progress
from rlhf.store.layout import TRAIN
from rlhf.training import engine, fit, ppo_math
from rlhf.training.health import Health
from rlhf.training.metrics import Metrics, MetricsLog, Trained, significant
from rlhf.training.paths import Paths
from rlhf.training.ptx import Ptx
from rlhf.training.rollout import Models, Rollout, by_length, compacted, roll_out
from rlhf.training.state import State
from rlhf.training.stopping import StopRequest, stopped


@dataclass(frozen=True)
class Targets:
    """What actor and critic learn from a rollout, both (B, A) float32."""

    advantages: Tensor  # whitened over the rollout
    returns: Tensor


@dataclass
class LoopState:
    """What the loop remembers between iterations; saved with every state."""

    score_mean: float
    score_sd: float
    kl_coef: float


@dataclass(frozen=True)
class Learner:
    """All that the training loop uses in every iteration."""

    models: Models
    sampler: Sampler
    config: Rlhf
    seed: int
    ema: Ema | None
    ptx: Ptx | None


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a mini-batch as models read them, and what PPO needs to know about their N response tokens."""

    batch: Padded | Packed  # (b, T), or (1, T)
    labels: Tensor  # bool of the same shape; True at the N response tokens
    old_logprobs: Tensor  # (N,) float32
    old_values: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32
    returns: Tensor  # (N,) float32
    tokens: int  # response tokens of the whole mini-batch


def load(actor: Path, scorer: Path, config: Rlhf) -> Models:
    """Return the four models as Hugging Face models, sharded as `config.run` says; all processes call it.

    Args:
        actor: directory of the SFT actor, which is the reference model too.
        scorer: directory of the reward model, from which the critic starts.

    Raises:
        DataError: weights or config.json cannot be read, or weights are missing, unexpected or of another
            shape.
        UserError: `actor` gives scores, not text, or scales its logits.
    """
    run, dtype, name = config.run, engine.DTYPES[config.dtype], config.dtype
    sharded, offloads = run.zero_stage == 3, "reference" in run.offload
    with engine.loading(actor, name, sharded=sharded):
        policy = load_actor(actor, dtype)
    with engine.loading(actor, name, sharded=sharded or offloads, offloads=offloads):
        frozen = None if reference.is_actor_without_adapters(config.actor_lora) else load_actor(actor, dtype)
    with engine.loading(scorer, name, sharded=sharded):
        critic, reward = (load_scorer(scorer, dtype) for _ in range(2))
    return Models(policy, critic, frozen, reward)


def train(models: Models, config: Rlhf, sampling: Sampling, seed: int, paths: Paths) -> Trained:
    """Train `models.actor` and `models.critic` in place, from the newest state if there is one.

    Args:
        models: as `load` returns them.

    Returns:
        means over the last tenth of the iterations (rank 0), the log of all, and the mean of the
        actor's weights where `ema_decay` is set.

    Raises:
        DataError: the reward model gives every response the same score, or LoRA's targets match no layer.
        DivergenceError: a loss or gradient is not finite.
        Stopped: SIGTERM came; the state is saved.
        UserError: another process trains the same artefact, the state does not fit the configuration, or
            `inference_tp_size` processes cannot divide the actor evenly.
    """
    prompts = Rows(paths.data / TRAIN)
    state = State(paths.work, config.run.shard_layout)
    state.lock()
    _add_adapters(models, config, seed)
    frozen = [model for model in (models.reward, models.reference) if model is not None]
    _choose_attention([models.actor, models.critic, *frozen], config.dtype)
    config = fit.fitted_rlhf([models.actor, models.critic], frozen, config)
    run = config.run
    iterations = rlhf_iterations(config, len(prompts))
    learner = _learner(models, config, sampling, iterations, seed, paths)
    _register(learner, state)
    found = state.load()
    done = found[0] if found else 0
    loop = LoopState(**found[1]) if found else _calibrate(learner, prompts)
    log, health = MetricsLog(paths.work, paths.board, done), Health()
    bar = progress(range(done, iterations), "PPO", unit="iteration", start=done, total=iterations)
    with StopRequest() as request:
        for iteration in bar:
            # 1. Responses to the next prompts, and what all models say about them.
            first = iteration * config.rollout_batch_size
            rows = order.stream(len(prompts), seed, first, config.rollout_batch_size)
            chosen = [prompts[int(i)][0] for i in rows]
            stream = Stream(seed, Purpose.ROLLOUT, first)
            rollout = roll_out(learner.models, learner.sampler, chosen, stream, run)
            # 2. Rewards and advantages.
            targets, metrics = _targets(rollout, config, loop, rng(seed, Purpose.SHUFFLED_SCORES, iteration))
            # 3. Several optimizer steps on both models.
            metrics |= _optimize(learner, rollout, targets, iteration)
            # 4. The KL coefficient, metrics, state.
            _adapt_kl_coef(loop, config, metrics["kl_ref"])
            log.log(iteration + 1, metrics, len(chosen), int(rollout.batch.mask.sum()))
            if parallel.rank() == 0:
                health.look(iteration + 1, metrics)
            if (iteration + 1) % run.log_steps == 0:
                bar.set_postfix({n: f"{metrics[n]:.3g}" for n in ("score", "kl_ref", "length")})
            stops = request.is_agreed()
            if (iteration + 1) % run.save_steps == 0 or iteration + 1 == iterations or stops:
                state.save(iteration + 1, vars(loop))
            if stops:
                raise stopped(iteration + 1)
    return Trained(_summary(log.path, iterations) if parallel.rank() == 0 else {}, log, run, learner.ema)


def _add_adapters(models: Models, config: Rlhf, seed: int) -> None:
    if config.actor_lora:
        lora.add(models.actor, config.actor_lora, seed_of(seed, Purpose.LORA))
    if config.critic_lora:
        lora.add(models.critic, config.critic_lora, seed_of(seed, Purpose.CRITIC_LORA))


def _choose_attention(models: Sequence[Any], dtype: str) -> None:
    """Let all models, the actor first, attend by kernels of variable length if every one of them can."""
    # Families that are not sampled by the engine are sampled by their own forward, which reads padded rows.
    if families.has_layout(models[0].config) and packing.obstacle(models, dtype) is None:
        for model in models:
            packing.use_kernel(model)


def _learner(
    models: Models, config: Rlhf, sampling: Sampling, iterations: int, seed: int, paths: Paths
) -> Learner:
    """Return engines around the four models, and what goes with them; LoRA is added first."""
    run, size = config.run, exact_div(config.rollout_batch_size, config.mini_batches, "mini-batch")
    batch, steps = plan_batch(size, run), iterations * config.ppo_epochs * config.mini_batches
    ptx, actor_batch = None, batch
    if config.ptx_coef is not None and paths.ptx is not None:
        rows = Rows(paths.ptx / TRAIN)
        width = rows.tokens_per_row.max() if packing.uses_kernel(models.actor) else None
        ptx = Ptx(rows, config.ptx_coef, sampling.pad_id, width, seed, size, steps, run.micro_rows)
        # The actor's optimizer steps have as many micro-batches of PTX as of PPO.
        actor_batch = replace(batch, train_batch_size=2 * size, grad_accum_steps=2 * batch.grad_accum_steps)
    dtype, offloads, frozen = config.dtype, "reference" in run.offload, models.reference
    actor = engine.Recipe(config.actor, config.actor_lora, actor_batch, steps, dtype, run)
    critic = engine.Recipe(config.critic, config.critic_lora, batch, steps, dtype, run)
    engines = Models(
        engine.initialize(models.actor, actor),
        engine.initialize(models.critic, critic),
        None if frozen is None else engine.frozen(frozen, dtype, offloads=offloads),
        engine.frozen(models.reward, dtype),
    )
    for model in (models.actor, models.critic, frozen, models.reward):
        if model is not None:
            use_graphs(model)  # now that parameters are where they stay
    ema = None if config.ema_decay is None else Ema(models.actor, config.ema_decay)
    sampler = Sampler(models.actor, sampling, parallel.group(run.inference_tp_size))
    return Learner(engines, sampler, config, seed, ema, ptx)


def _register(learner: Learner, state: State) -> None:
    """Name what a state saves: the trained engines, and the mean of the actor's weights."""
    state.engines |= {"actor": learner.models.actor, "critic": learner.models.critic}
    if learner.ema:
        state.tensors["ema"] = learner.ema.means
        state.shared |= set() if learner.ema.is_sharded else {"ema"}


def _calibrate(learner: Learner, prompts: Rows) -> LoopState:
    """Return the loop's first state, with mean and sd of the scores of the SFT model's responses.

    The actor is not trained yet, so its responses are those of the SFT model.
    """
    config, seed = learner.config, learner.seed
    rows = order.stream(len(prompts), seed, 0, config.reward_samples)
    raw = []
    for part in slices(config.reward_samples, config.rollout_batch_size):
        chosen = [prompts[int(i)][0] for i in rows[part]]
        stream = Stream(seed, Purpose.CALIBRATION, part.start)
        raw.append(roll_out(learner.models, learner.sampler, chosen, stream, config.run).scores)
    scores = torch.cat(raw)
    if not scores.std() > 0:
        raise DataError(
            f"the reward model gives every response the same score, {float(scores[0])}: look at its"
            " metrics and its data"
        )
    return LoopState(float(scores.mean()), float(scores.std()), config.kl_coef)


def _targets(
    rollout: Rollout, config: Rlhf, loop: LoopState, noise: np.random.Generator
) -> tuple[Targets, Metrics]:
    """Return advantages and returns of a rollout, and its metrics."""
    mask = rollout.response_mask  # (B, A)
    normalised = (rollout.scores - loop.score_mean) / loop.score_sd  # (B,)
    finished = normalised - config.missing_eos_penalty * ~rollout.ended  # (B,)
    clipped = finished.clamp(-config.reward_clip, config.reward_clip)  # (B,)
    if config.shuffle_scores:
        clipped = clipped[torch.from_numpy(noise.permutation(len(clipped))).to(clipped.device)]
    kl = (rollout.old_logprobs - rollout.ref_logprobs) * mask  # (B, A)
    rewards = ppo_math.shape_rewards(kl, clipped, mask, loop.kl_coef)  # (B, A)
    advantages, returns = ppo_math.gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)
    lengths = mask.sum(-1).float()  # (B,)
    metrics = {
        "score": normalised.mean(),
        "score_raw": rollout.scores.mean(),
        "rlhf_reward": rewards.sum(-1).mean(),
        "non_score_reward": (-loop.kl_coef * kl).sum(-1).mean(),
        "kl_ref": kl.sum(-1).mean(),
        "kl_coef": loop.kl_coef,
        "length": lengths.mean(),
        "ended": rollout.ended.float().mean(),
        "score_length_correlation": ppo_math.correlation(rollout.scores, lengths),
        "value": ppo_math.masked_mean(rollout.values, mask),
        "explained_variance": ppo_math.explained_variance(rollout.values, returns, mask),
    }
    metrics |= ppo_math.sampling_mismatch(rollout.sampled_logprobs, rollout.old_logprobs, mask)
    return Targets(ppo_math.whiten(advantages, mask), returns), _floats(metrics)


def _adapt_kl_coef(loop: LoopState, config: Rlhf, kl: float) -> None:
    """Change an adaptive coefficient so that KL moves towards its target; keep a fixed one."""
    if config.kl_target is not None:
        loop.kl_coef = ppo_math.next_kl_coef(
            loop.kl_coef, kl, config.kl_target, config.rollout_batch_size, config.kl_horizon
        )


def _optimize(learner: Learner, rollout: Rollout, targets: Targets, iteration: int) -> Metrics:
    """Pass `ppo_epochs` times over a rollout in shuffled mini-batches; return mean metrics."""
    config, rows = learner.config, len(rollout.ended)
    size = exact_div(rows, config.mini_batches, "mini-batches of a rollout")
    history: list[Metrics] = []
    for epoch in range(config.ppo_epochs):
        noise = rng(learner.seed, Purpose.MINI_BATCHES, iteration, epoch)
        shuffled = torch.from_numpy(noise.permutation(rows)).to(rollout.ended.device)
        for mini_batch in slices(rows, size):
            number = iteration * config.ppo_epochs * config.mini_batches + len(history)
            history.append(_step(learner, rollout, targets, shuffled[mini_batch], number))
    means = {name: float(np.mean([h[name] for h in history])) for name in history[0]}
    return means | {
        "ratio_mean_max": max(h["ratio_mean"] for h in history),
        "first_approx_kl": history[0]["approx_kl"],
    }


def _step(learner: Learner, rollout: Rollout, targets: Targets, rows: Tensor, number: int) -> Metrics:
    """Do one optimizer step on both models over a mini-batch; return its metrics.

    Responses of similar length form a micro-batch, and processes share the micro-batches. The gradient does
    not depend on this, because losses are divided by the tokens of the whole mini-batch.

    Args:
        rows: (b,) int64, the rollout's rows in the mini-batch.
        number: optimizer steps before this one.
    """
    actor, critic, config, ptx = learner.models.actor, learner.models.critic, learner.config, learner.ptx
    tokens = int(rollout.response_mask[rows].sum())
    grouped = parallel.own_share(by_length(rollout.batch, rows, config.run.micro_rows))
    packs = learner.models.read_packed_rows
    micro_batches = [_micro_batch(rollout, targets, part, tokens, packs=packs) for part in grouped]
    parts: list[dict[str, Tensor]] = []  # not read before the end: the GPU would wait for Python
    learning_rate = actor.get_lr()[0]
    # `partial` binds what a loss needs: ZeRO-3's hooks copy lists among a forward's own arguments.
    for micro_batch in micro_batches:
        loss, metrics = actor(partial(_actor_loss, micro=micro_batch, config=config))
        engine.backward(actor, loss)
        parts.append(metrics)
    if ptx:
        for imitated, total in ptx.micro_batches(number):
            loss = actor(partial(ptx.loss, rows=imitated, tokens=total))
            engine.backward(actor, ptx.coef * loss)
            parts.append({"ptx_loss": loss.detach()})
    actor_norm = engine.step(actor)
    for micro_batch in micro_batches:
        loss, metrics = critic(partial(_critic_loss, micro=micro_batch, config=config))
        engine.backward(critic, loss)
        parts.append(metrics)
    critic_norm = engine.step(critic)
    if learner.ema:
        learner.ema.update()
    norms = {"actor_grad_norm": actor_norm, "critic_grad_norm": critic_norm}
    return {**_total(parts), **norms, "actor_learning_rate": learning_rate}


def _total(parts: Sequence[dict[str, Tensor]]) -> Metrics:
    """Return the sum of each metric over micro-batches and processes."""
    names = dict.fromkeys(name for part in parts for name in part)
    return parallel.all_sum({name: sum(float(part.get(name, 0.0)) for part in parts) for name in names})


def _micro_batch(rollout: Rollout, targets: Targets, rows: Tensor, tokens: int, *, packs: bool) -> MicroBatch:
    """Return `rows`, (b,) int64, of a rollout as a micro-batch; (B, A) tensors become (N,)."""
    mask = rollout.response_mask[rows]  # (b, A), N of them True
    batch, labels = compacted(rollout.batch, rollout.response_mask, rows, packs=packs)
    return MicroBatch(
        batch,
        labels,
        old_logprobs=rollout.old_logprobs[rows][mask],
        old_values=rollout.values[rows][mask],
        advantages=targets.advantages[rows][mask],
        returns=targets.returns[rows][mask],
        tokens=tokens,
    )


def _actor_loss(model: Any, micro: MicroBatch, config: Rlhf) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's part of the policy loss, and of the metrics, all float32 scalars."""
    found = response_logprobs_and_entropy(model, micro.batch, micro.labels, config.temperature)
    logprobs, entropy = found  # (N,) each
    logratio = logprobs - micro.old_logprobs  # (N,)
    losses = ppo_math.policy_loss(logratio, micro.advantages, config.clip_range)  # (N,)
    with torch.no_grad():
        ratio = logratio.exp()
        per_token = {
            "policy_loss": losses,
            "entropy": entropy,
            "approx_kl": ppo_math.approx_kl(logratio),
            "ratio_mean": ratio,
            "ratio_variance": (ratio - 1) ** 2,
            "clip_fraction": ((ratio - 1).abs() > config.clip_range).float(),
        }
        metrics = {name: x.sum() / micro.tokens for name, x in per_token.items()}
    return losses.sum() / micro.tokens, metrics


def _critic_loss(model: Any, micro: MicroBatch, config: Rlhf) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's part of the value loss, and of the metrics, all float32 scalars."""
    values = response_values(model, micro.batch, micro.labels)  # (N,)
    losses = ppo_math.value_loss(values, micro.old_values, micro.returns, config.value_clip_range)
    loss = losses.sum() / micro.tokens
    outside = (values - micro.old_values).abs() > config.value_clip_range
    metrics = {"value_loss": loss.detach(), "value_clip_fraction": outside.sum() / micro.tokens}
    return loss, metrics


def _floats(values: dict[str, Any]) -> Metrics:
    return {name: float(value) for name, value in values.items()}


def _summary(metrics: Path, iterations: int) -> Metrics:
    """Return the means of the last tenth of the iterations."""
    lines = list(jsonl.read(metrics))[-max(1, iterations // 10) :]
    return {n: significant(sum(line[n] for line in lines) / len(lines)) for n in lines[0] if n != "step"}
