"""The PPO loop: the rewards and advantages of a rollout, what is learned from it, and what its settings do.

Formulae are tested in `test_ppo_math`; `test_processes` tests that micro-batches and processes change nothing.
"""

from __future__ import annotations

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trainings
from safetensors.torch import load_file

from rlhf.data import order
from rlhf.data.rows import Rows
from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import Packed, Padded
from rlhf.generation.sampler import Sampler, generate
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models import loading
from rlhf.models.outputs import scores
from rlhf.training import ppo, ppo_math, sft
from rlhf.training import rollout as rollout_module
from rlhf.training.ptx import Ptx
from rlhf.training.rollout import Models, Rollout, observe, roll_out
from rlhf.training.wrapped import SingleForward

close = torch.testing.assert_close
LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
MASK = torch.arange(4) < LENGTHS[:, None]
ENDED = torch.tensor([True, False, True, False, True, False])


def targets_of(scores, control=None, seed=0, values=None, **changes):
    """Return targets and metrics of responses with these scores, and with a critic's values or 0."""
    zeros = torch.zeros(MASK.shape)
    batch = Padded(
        torch.zeros(6, 7, dtype=torch.long), torch.cat([torch.ones(6, 3, dtype=torch.bool), MASK], 1)
    )
    values = zeros if values is None else values
    rollout = Rollout(batch, MASK, ENDED, zeros, zeros, zeros, values, torch.as_tensor(scores))
    config = trainings.settings("rlhf", changes)
    control = control or ppo.LoopState(score_mean=0.0, score_sd=1.0, kl_coef=0.1)
    return ppo._targets(rollout, config, control, np.random.default_rng(seed))


def rewards_of(scores, control=None, seed=0, **changes):
    """Return the reward of each response, and metrics: without critic and discount a return is the reward."""
    targets, metrics = targets_of(scores, control, seed, **{"gamma": 1.0, "gae_lambda": 1.0, **changes})
    assert (targets.returns[~MASK] == 0).all()
    for row, length in zip(targets.returns, LENGTHS, strict=True):  # the same from every token on
        assert (row[:length] == row[0]).all()
    return targets.returns[:, 0], metrics


def test_gamma_discounts_later_rewards_and_lambda_weighs_them_against_values():
    """The fourth response has two tokens: a score of 3 after values of 1 and 2, by hand."""
    targets, _ = targets_of(
        [0.0, 0.0, 0.0, 3.0, 0.0, 0.0],
        values=torch.tensor([1.0, 2.0, 5.0, 5.0]).expand(6, -1),
        gamma=0.5,
        gae_lambda=0.25,
        missing_eos_penalty=0.0,
    )
    first = 0.5 * 2 + 0.5 * 0.25 * (3 - 2)
    close(targets.returns[3], torch.tensor([first, 3.0, 0.0, 0.0]))


def test_advantages_are_whitened_over_response_tokens_and_returns_are_not():
    """Returns, which the critic learns, keep their size."""
    scores = torch.tensor([5.0, -1.0, 2.0, 4.0, 0.5, 3.0])
    targets, _ = targets_of(scores, values=torch.full(MASK.shape, 9.0), reward_clip=100.0)
    inside = targets.advantages[MASK]
    close(inside.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    close(inside.var(correction=0), torch.tensor(1.0))
    assert (targets.advantages[~MASK] == 0).all()
    raw = targets.returns[MASK] - 9  # advantages before: whitening keeps their order
    assert torch.equal(raw.argsort(stable=True), inside.argsort(stable=True))
    assert raw.std() > 1.5


def test_only_responses_without_eos_are_penalised():
    scores = torch.linspace(-1, 1, 6)
    found, metrics = rewards_of(scores, missing_eos_penalty=0.75)
    torch.testing.assert_close(found, scores - 0.75 * ~ENDED)
    assert metrics["score"] == pytest.approx(0, abs=1e-6)  # reported without the penalty
    assert metrics["ended"] == 0.5


@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_scores_are_clipped_after_normalisation_and_penalty(clip):
    control = ppo.LoopState(score_mean=10.0, score_sd=2.0, kl_coef=0.1)
    found, _ = rewards_of(
        [110.0, 110.0, -90.0, -90.0, 12.0, 12.0], control, missing_eos_penalty=1.0, reward_clip=clip
    )
    torch.testing.assert_close(found, torch.tensor([clip, clip, -clip, -clip, 1.0, 0.0]))


def test_shuffled_scores_are_a_permutation_decided_by_the_random_numbers():
    """The same numbers give the same permutation, another iteration's numbers give another."""
    scores = torch.arange(6.0) / 2
    plain, _ = rewards_of(scores, missing_eos_penalty=0.0)
    first, again, other = (
        rewards_of(scores, missing_eos_penalty=0.0, shuffle_scores=True, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(plain, scores)
    for shuffled in (first, other):
        assert not torch.equal(shuffled, scores)
        assert torch.equal(shuffled.sort().values, scores)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture(scope="module")
def scorers(actor_path):
    """Return a critic and a reward model."""
    return [loading.new_scorer(actor_path, torch.float32, trainings.PAD, seed=s).eval() for s in (3, 4)]


@pytest.mark.parametrize("size", [16, 8])
def test_scores_have_mean_0_and_sd_1_over_responses_of_the_sft_model(actor, scorers, tmp_path, size):
    """Whatever the reward model's scale, and in one rollout or two."""
    trainings.write_rows(tmp_path, "rlhf", vocabulary=64)
    prompts, (critic, reward) = Rows(tmp_path / "train"), map(SingleForward, scorers)
    models = Models(SingleForward(actor), critic, SingleForward(actor), reward)
    sampling = Sampling(6, 1.0, trainings.EOS, trainings.PAD)
    config = trainings.settings("rlhf", {"rollout_batch_size": size, "mini_batches": 1, "kl_coef": 0.7})
    sampler = Sampler(actor, sampling)
    learner = ppo.Learner(models, sampler, config, trainings.SEED, ema=None, ptx=None)
    control = ppo._calibrate(learner, prompts)
    rows = order.stream(len(prompts), trainings.SEED, 0, config.reward_samples)
    stream = Stream(trainings.SEED, Purpose.CALIBRATION)
    rollout = roll_out(models, sampler, [prompts[int(i)][0] for i in rows], stream, config.run)
    assert abs(rollout.scores.mean()) + abs(rollout.scores.std() - 1) > 0.1  # raw ones are not so by chance
    assert ppo._targets(rollout, config, control, None)[1]["score"] == pytest.approx(0, abs=1e-4)
    assert control.score_sd == pytest.approx(float(rollout.scores.std()), rel=1e-3)
    assert control.kl_coef == 0.7


@pytest.fixture
def rollout(actor, scorers, sequences):
    """A rollout at temperature 0.7 of three prompts."""
    critic, reward = map(SingleForward, scorers)
    sampling = Sampling(6, 0.7, trainings.EOS, trainings.PAD)
    noise = uniforms(Stream(trainings.SEED, Purpose.ROLLOUT), range(3), 6)
    generated = generate(actor, sequences(3, 9, 5), sampling, noise)
    models = Models(SingleForward(actor), critic, SingleForward(actor), reward)
    return observe(models, generated, 0.7, micro_batch_size=2)


def test_values_and_logprobs_are_those_of_the_state_before_a_token(rollout, actor, scorers):
    """Transformers' own forward reads the prompt and the response so far, alone, token by token."""
    for row, length in enumerate(rollout.response_mask.sum(-1).tolist()):
        whole = rollout.batch.ids[row][rollout.batch.mask[row]]
        for t, token in enumerate(whole[-length:]):
            state = whole[None, : len(whole) - length + t]
            with torch.no_grad():
                logits = actor(input_ids=state).logits[0, -1] / 0.7
                value = scorers[0].score(scorers[0].model(input_ids=state).last_hidden_state)[0, -1, 0]
            close(rollout.values[row, t], value, atol=1e-4, rtol=1e-4)
            close(rollout.old_logprobs[row, t], logits.log_softmax(-1)[token], atol=1e-4, rtol=1e-4)


def test_ratios_and_values_each_have_a_clipping_range(rollout, actor, scorers):
    """The models have moved since the rollout: some tokens are outside a range, some within."""
    mask, (moved, by, advantages, returns) = (
        rollout.response_mask,
        torch.randn(4, *rollout.response_mask.shape),
    )
    old = Rollout(
        rollout.batch,
        mask,
        rollout.ended,
        rollout.sampled_logprobs,
        rollout.old_logprobs - 0.2 * moved,
        rollout.ref_logprobs,
        rollout.values - 0.2 * by,
        rollout.scores,
    )
    ranges = {"clip_range": 0.05, "value_clip_range": 0.3, "temperature": 0.7}
    config, rows = trainings.settings("rlhf", ranges), torch.arange(len(mask))
    micro = ppo._micro_batch(old, ppo.Targets(advantages, returns), rows, tokens=int(mask.sum()), packs=False)
    policy_loss, of_actor = ppo._actor_loss(actor, micro, config)
    value_loss, of_critic = ppo._critic_loss(scorers[0], micro, config)
    expected = (
        ppo_math.policy_loss(0.2 * moved, advantages, 0.05),
        ppo_math.value_loss(rollout.values, old.values, returns, 0.3),
    )
    for loss, per_token in zip((policy_loss, value_loss), expected, strict=True):
        close(loss, per_token[mask].mean(), atol=1e-4, rtol=1e-3)
    ratios = (0.2 * moved[mask]).exp()
    assert float(of_actor["clip_fraction"]) == pytest.approx(
        float(((ratios - 1).abs() > 0.05).float().mean())
    )
    assert float(of_critic["value_clip_fraction"]) == pytest.approx(
        float((0.2 * by[mask].abs() > 0.3).float().mean())
    )


def test_packed_micro_batches_have_the_losses_of_padded_ones(rollout, actor, scorers, monkeypatch):
    config, rows = trainings.settings("rlhf", {}), torch.arange(len(rollout.ended)).flip(0)
    advantages, returns = torch.randn(2, *rollout.response_mask.shape)
    targets = ppo.Targets(advantages, returns)
    monkeypatch.setattr(rollout_module, "WASTE", 0.0)
    padded, packed = (
        ppo._micro_batch(rollout, targets, rows, tokens=9, packs=packs) for packs in (False, True)
    )
    assert (type(padded.batch), type(packed.batch)) == (Padded, Packed)
    for loss, model in ((ppo._actor_loss, actor), (ppo._critic_loss, scorers[0])):
        ours, theirs = loss(model, packed, config), loss(model, padded, config)
        close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)
        for name in ours[1]:
            close(ours[1][name], theirs[1][name], atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        found = [scores(scorers[1], micro.batch) for micro in (packed, padded)]
    close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("epochs", "count"), [(1, 2), (3, 2), (2, 4)])
def test_every_epoch_passes_once_over_the_rollout_in_its_own_order(monkeypatch, epochs, count):
    steps = []

    def note(learner, rollout, targets, rows, number):
        steps.append((number, rows.tolist()))
        return {"ratio_mean": 1.0, "approx_kl": 0.0}

    monkeypatch.setattr(ppo, "_step", note)
    config = trainings.settings("rlhf", {"ppo_epochs": epochs, "mini_batches": count})
    learner = ppo.Learner(None, None, config, trainings.SEED, None, None)
    rollout = SimpleNamespace(ended=torch.zeros(16))
    for iteration in range(2):
        ppo._optimize(learner, rollout, None, iteration)
    numbers, chosen = zip(*steps, strict=True)
    assert numbers == tuple(range(2 * epochs * count))
    assert {len(rows) for rows in chosen} == {16 // count}
    orders = [list(chain(*chosen[e * count : (e + 1) * count])) for e in range(2 * epochs)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(16))}) == 2 * epochs + 1


def test_micro_batches_of_ptx_add_up_to_the_sft_loss_of_the_whole_batch(actor, tmp_path):
    trainings.write_rows(tmp_path, "sft", vocabulary=64)
    rows = Rows(tmp_path / "train")
    ptx = Ptx(
        rows, coef=3.0, pad_id=trainings.PAD, pack_width=None, seed=1, size=8, steps=9, micro_batch_size=3
    )
    task = sft.task(trainings.PAD)
    chosen = [rows[int(i)] for i in order.batch(rows.tokens_per_row, 8, 5, 9, 1)]
    with torch.no_grad():
        losses = [ptx.loss(actor, part, tokens) for part, tokens in ptx.micro_batches(5)]
        expected = trainings.loss(task, actor, chosen) / task.terms(chosen)
    assert len(losses) == 3
    close(sum(losses), expected)


def test_ptx_is_added_to_the_policy_loss_with_its_coefficient_and_reported_without(
    monkeypatch, actor, scorers, rollout, tmp_path
):
    class Engine(SingleForward):
        def get_lr(self):
            return [0.0]

    losses = []
    monkeypatch.setattr(ppo.engine, "backward", lambda engine, loss: losses.append((engine, loss.detach())))
    monkeypatch.setattr(ppo.engine, "step", lambda engine: 0.0)
    trainings.write_rows(tmp_path, "sft", vocabulary=64)
    rows = Rows(tmp_path / "train")
    ptx = Ptx(
        rows, coef=3.0, pad_id=trainings.PAD, pack_width=None, seed=1, size=8, steps=9, micro_batch_size=3
    )
    models = Models(Engine(actor), Engine(scorers[0]), None, None)
    learner = ppo.Learner(models, None, trainings.settings("rlhf", {}), trainings.SEED, None, ptx)
    targets = ppo.Targets(*torch.randn(2, *rollout.response_mask.shape))
    metrics = ppo._step(learner, rollout, targets, torch.arange(3), 5)
    assert [engine is models.actor for engine, _ in losses] == [True] * 4 + [False]
    policy, *imitation, value = (loss for _, loss in losses)
    task, chosen = sft.task(trainings.PAD), order.batch(rows.tokens_per_row, 8, 5, 9, 1)
    batch = [rows[int(i)] for i in chosen]
    with torch.no_grad():
        expected = trainings.loss(task, actor, batch) / task.terms(batch)
    close(sum(imitation), 3 * expected)
    assert metrics["ptx_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["policy_loss"] == pytest.approx(float(policy), rel=1e-5)
    assert metrics["value_loss"] == pytest.approx(float(value), rel=1e-5)


NARROW = {"clip_range": 1e-4, "value_clip_range": 1e-4}  # any change is outside
STILL = {
    "actor": {"learning_rate": 0.0},
    "critic": {"learning_rate": 0.0},
    "ppo_epochs": 2,
    "mini_batches": 4,
    **NARROW,
}
ADAPTIVE = {
    "actor": {"learning_rate": 1e-3},
    "iterations": 3,
    "kl_coef": 0.3,
    "kl_target": 1e-3,
    "kl_horizon": 80,
}
CASES = {
    "still": STILL,
    "still-cooler": {**STILL, "temperature": 0.7},
    "adaptive": ADAPTIVE,
    "critic-still": {"actor": {"learning_rate": 1e-3}, "critic": {"learning_rate": 0.0}},
}


@pytest.fixture(scope="module")
def results(actor_path, tmp_path_factory):
    """Return name of a case -> directory of its results."""
    root = tmp_path_factory.mktemp("ppo")
    loading.new_scorer(actor_path, torch.float32, trainings.PAD, seed=3).save_pretrained(root / "scorer")
    trainings.write_rows(root / "data/rlhf", "rlhf", vocabulary=64)
    sources = {"actor": actor_path, "scorer": root / "scorer", "data": root / "data"}
    cases = [
        {"name": name, "stage": "rlhf", "changes": changes, "again": name == "adaptive"}
        for name, changes in CASES.items()
    ]
    out = trainings.launch(root, 1, sources, cases)
    return {"sources": sources} | {name: out / name for name in CASES}


def metrics_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", ["still", "still-cooler"])
def test_without_learning_ratios_are_1_and_divergences_0(results, name):
    """To 1e-5: a mini-batch is computed in other micro-batches than its rollout."""
    lines = metrics_of(results[name])
    assert len(lines) == 2
    for line in lines:
        assert line["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert line["ratio_mean_max"] == pytest.approx(1, abs=1e-5)
        for metric in (
            "ratio_variance",
            "clip_fraction",
            "approx_kl",
            "first_approx_kl",
            "value_clip_fraction",
        ):
            assert line[metric] == pytest.approx(0, abs=1e-8), metric
        assert line["kl_ref"] == pytest.approx(0, abs=1e-5)
        assert line["actor_grad_norm"] > 0.01


def test_a_lower_temperature_samples_other_responses_with_less_entropy(results):
    for one, cooler in zip(*(metrics_of(results[name]) for name in ("still", "still-cooler")), strict=True):
        assert cooler["entropy"] < 0.9 * one["entropy"]
        assert cooler["score_raw"] != pytest.approx(one["score_raw"], abs=1e-3)  # with the same noise


def test_without_learning_weights_keep_their_bits(results):
    for role, source in (("model", "actor"), ("critic", "scorer")):
        before, after = weights(results["sources"][source]), weights(results["still"] / role)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_actor_and_critic_each_have_a_learning_rate(results):
    """The critic's is 0; the actor's first steps of Adam are as long as its rate."""
    path, sources = results["critic-still"], results["sources"]
    before, after = weights(sources["scorer"]), weights(path / "critic")
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = weights(sources["actor"]), weights(path / "model")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert all(line["actor_learning_rate"] == 1e-3 for line in metrics_of(path))


def test_an_adaptive_coefficient_follows_the_kl_also_after_a_resume(results):
    """Below the target it falls, above it rises, by at most 0.2 times 16 samples over a horizon of 80."""
    lines = metrics_of(results["adaptive"])
    below, above = lines[0]["kl_ref"], lines[1]["kl_ref"]
    assert below < 0.8 * ADAPTIVE["kl_target"] < 1.2 * ADAPTIVE["kl_target"] < above
    coefficients = [line["kl_coef"] for line in lines]
    assert coefficients == pytest.approx([0.3, 0.3 * 0.96, 0.3 * 0.96 * 1.04], rel=1e-6)
    for line in lines[1:]:
        assert line["non_score_reward"] == pytest.approx(-line["kl_coef"] * line["kl_ref"], rel=1e-4)
    again = metrics_of(results["adaptive"] / "again")  # from the state after two iterations
    assert again == lines
