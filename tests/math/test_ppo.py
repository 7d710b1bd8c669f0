"""The loop of step 3: what a rollout sees and asks for, what is learned from it, and what its settings do.

Formulae are tested in `test_ppo_math`, that micro-batches and processes change nothing in `test_processes`.
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

from rlhf import models, order, ppo, ppo_math, rollout, sft
from rlhf.engine import Root
from rlhf.generation import Sampling
from rlhf.ptx import Ptx
from rlhf.rollout import Models, Rollout
from rlhf.rows import Rows
from rlhf.streams import Purpose
from rlhf.tokens import Padded

close = torch.testing.assert_close
LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
MASK = torch.arange(4) < LENGTHS[:, None]
ENDED = torch.tensor([True, False, True, False, True, False])


def targets_of(scores, control=None, seed=0, values=None, **changes):
    """Return what `_targets` makes of replies with some scores, and of a critic's values, 0 without any."""
    zeros = torch.zeros(MASK.shape)
    batch = Padded(
        torch.zeros(6, 7, dtype=torch.long), torch.cat([torch.ones(6, 3, dtype=torch.bool), MASK], 1)
    )
    values = zeros if values is None else values
    seen = Rollout(batch, MASK, ENDED, zeros, zeros, values, torch.as_tensor(scores))
    config = trainings.settings("rlhf", changes)
    control = control or ppo.Controller(score_mean=0.0, score_sd=1.0, kl_coef=0.1)
    return ppo._targets(seen, config, control, np.random.default_rng(seed))


def asked(scores, control=None, seed=0, **changes):
    """Return what `_targets` asks for each reply: without a critic or discount its return is its reward."""
    targets, values = targets_of(scores, control, seed, **{"gamma": 1.0, "gae_lambda": 1.0, **changes})
    assert (targets.returns[~MASK] == 0).all()
    for row, length in zip(targets.returns, LENGTHS, strict=True):  # the same from every token on
        assert (row[:length] == row[0]).all()
    return targets.returns[:, 0], values


def test_gamma_discounts_what_follows_and_lambda_weighs_what_was_seen():
    """The fourth reply has two tokens: a score of 3 after values of 1 and 2, by hand."""
    targets, _ = targets_of(
        [0.0, 0.0, 0.0, 3.0, 0.0, 0.0], values=torch.tensor([1.0, 2.0, 5.0, 5.0]).expand(6, -1),
        gamma=0.5, gae_lambda=0.25, missing_eos_penalty=0.0,
    )  # fmt: skip
    first = 0.5 * 2 + 0.5 * 0.25 * (3 - 2)
    close(targets.returns[3], torch.tensor([first, 3.0, 0.0, 0.0]))


def test_advantages_are_whitened_over_the_tokens_of_replies():
    """And only they: what the critic learns, returns, keeps its size."""
    scores = torch.tensor([5.0, -1.0, 2.0, 4.0, 0.5, 3.0])
    targets, _ = targets_of(scores, values=torch.full(MASK.shape, 9.0), reward_clip=100.0)
    inside = targets.advantages[MASK]
    close(inside.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    close(inside.var(correction=0), torch.tensor(1.0))
    assert (targets.advantages[~MASK] == 0).all()
    raw = targets.returns[MASK] - 9  # advantages before: whitening keeps their order
    assert torch.equal(raw.argsort(stable=True), inside.argsort(stable=True))
    assert raw.std() > 1.5


def test_only_replies_without_eos_are_penalised():
    scores = torch.linspace(-1, 1, 6)
    found, values = asked(scores, missing_eos_penalty=0.75)
    torch.testing.assert_close(found, scores - 0.75 * ~ENDED)
    assert values["score"] == pytest.approx(0, abs=1e-6)  # told without the penalty
    assert values["ended"] == 0.5


@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_scores_are_clipped_after_normalising_and_the_penalty(clip):
    control = ppo.Controller(score_mean=10.0, score_sd=2.0, kl_coef=0.1)
    found, _ = asked(
        [110.0, 110.0, -90.0, -90.0, 12.0, 12.0], control, missing_eos_penalty=1.0, reward_clip=clip
    )
    torch.testing.assert_close(found, torch.tensor([clip, clip, -clip, -clip, 1.0, 0.0]))


def test_a_control_gives_replies_each_others_scores():
    """A permutation of the batch, another one with another iteration's numbers, the same with the same."""
    scores = torch.arange(6.0) / 2
    plain, _ = asked(scores, missing_eos_penalty=0.0)
    first, again, other = (
        asked(scores, missing_eos_penalty=0.0, shuffle_scores=True, seed=seed)[0] for seed in (1, 1, 2)
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
    return [models.new_scorer(actor_path, torch.float32, trainings.PAD, seed=s).eval() for s in (3, 4)]


@pytest.mark.parametrize("size", [16, 8])
def test_scores_have_mean_0_and_sd_1_over_the_replies_of_the_sft_model(actor, scorers, tmp_path, size):
    """Whatever the reward model's scale, and in how many rollouts they are drawn."""
    trainings.write_rows(tmp_path, "rlhf", vocabulary=64)
    prompts, (critic, judge) = Rows(tmp_path / "train"), map(Root, scorers)
    four, sampling = (
        Models(Root(actor), critic, Root(actor), judge),
        Sampling(6, 1.0, trainings.EOS, trainings.PAD),
    )
    setup = trainings.settings("rlhf", {"rollout_batch_size": size, "mini_batches": 1, "kl_coef": 0.7})
    control = ppo._calibrate(four, setup, sampling, trainings.SEED, prompts)
    asked = [prompts[int(i)][0] for i in order.stream(len(prompts), trainings.SEED, 0, setup.reward_samples)]
    seen = rollout.roll_out(four, asked, sampling, trainings.SEED, Purpose.CALIBRATION, 0, setup.run)
    assert abs(seen.scores.mean()) + abs(seen.scores.std() - 1) > 0.1  # raw ones are not so by chance
    assert ppo._targets(seen, setup, control, None)[1]["score"] == pytest.approx(0, abs=1e-4)
    assert control.score_sd == pytest.approx(float(seen.scores.std()), rel=1e-3)
    assert control.kl_coef == 0.7


@pytest.fixture
def seen(actor, scorers, sequences):
    """A rollout at temperature 0.7 of three prompts."""
    critic, judge = map(Root, scorers)
    sampling, prompts = Sampling(6, 0.7, trainings.EOS, trainings.PAD), sequences(3, 9, 5)
    made = rollout.reply(actor, prompts, sampling, trainings.SEED, Purpose.ROLLOUT, range(3))
    return rollout.observe(Models(Root(actor), critic, Root(actor), judge), made, 0.7, micro_batch_size=2)


def test_values_and_logprobs_are_those_of_the_state_before_a_token(seen, actor, scorers):
    """The prompt and what was replied so far is read alone, token by token, by transformers' own forward."""
    for row, length in enumerate(seen.response_mask.sum(-1).tolist()):
        whole = seen.batch.ids[row][seen.batch.mask[row]]
        for t, token in enumerate(whole[-length:]):
            state = whole[None, : len(whole) - length + t]
            with torch.no_grad():
                logits = actor(input_ids=state).logits[0, -1] / 0.7
                value = scorers[0].score(scorers[0].model(input_ids=state).last_hidden_state)[0, -1, 0]
            close(seen.values[row, t], value, atol=1e-4, rtol=1e-4)
            close(seen.old_logprobs[row, t], logits.log_softmax(-1)[token], atol=1e-4, rtol=1e-4)


def test_ratios_and_values_are_clipped_by_ranges_of_their_own(seen, actor, scorers):
    """The models have moved since the rollout: some tokens are outside a range, some within."""
    mask, (moved, by, advantages, returns) = seen.response_mask, torch.randn(4, *seen.response_mask.shape)
    old = Rollout(
        seen.batch, mask, seen.ended, seen.old_logprobs - 0.2 * moved, seen.ref_logprobs,
        seen.values - 0.2 * by, seen.scores,
    )  # fmt: skip
    ranges = {"clip_range": 0.05, "value_clip_range": 0.3, "temperature": 0.7}
    config, told = trainings.settings("rlhf", ranges), []
    part = ppo._part(old, ppo.Targets(advantages, returns), torch.arange(len(mask)), tokens=int(mask.sum()))
    found = ppo._actor_loss(actor, part, config, told), ppo._critic_loss(scorers[0], part, config, told)
    expected = (
        ppo_math.policy_loss(0.2 * moved, advantages, 0.05),
        ppo_math.value_loss(seen.values, old.values, returns, 0.3),
    )
    for loss, per_token in zip(found, expected, strict=True):
        close(loss, per_token[mask].mean(), atol=1e-4, rtol=1e-3)
    ratios = (0.2 * moved[mask]).exp()
    assert told[0]["clip_fraction"] == pytest.approx(float(((ratios - 1).abs() > 0.05).float().mean()))
    assert told[1]["value_clip_fraction"] == pytest.approx(float((0.2 * by[mask].abs() > 0.3).float().mean()))


@pytest.mark.parametrize(("epochs", "parts"), [(1, 2), (3, 2), (2, 4)])
def test_every_epoch_passes_once_over_the_rollout_in_an_order_of_its_own(monkeypatch, epochs, parts):
    steps = []

    def note(learner, seen, targets, chosen, number):
        steps.append((number, chosen.tolist()))
        return {"ratio_mean": 1.0, "approx_kl": 0.0}

    monkeypatch.setattr(ppo, "_step", note)
    config = trainings.settings("rlhf", {"ppo_epochs": epochs, "mini_batches": parts})
    learner, replies = ppo.Learner(None, config, None, None), SimpleNamespace(ended=torch.zeros(16))
    for iteration in range(2):
        ppo._update(learner, replies, None, iteration, trainings.SEED)
    numbers, chosen = zip(*steps, strict=True)
    assert numbers == tuple(range(2 * epochs * parts))
    assert {len(rows) for rows in chosen} == {16 // parts}
    orders = [list(chain(*chosen[e * parts : (e + 1) * parts])) for e in range(2 * epochs)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({*map(tuple, orders), tuple(range(16))}) == 2 * epochs + 1


def test_ptx_is_the_loss_of_step_1_times_its_coefficient(actor, tmp_path):
    trainings.write_rows(tmp_path, "sft", vocabulary=64)
    rows, metrics = Rows(tmp_path / "train"), []
    ptx = Ptx(rows, coef=3.0, pad_id=trainings.PAD, seed=1, size=8, steps=9, micro_batch_size=3)
    task = sft.task(trainings.PAD)
    chosen = [rows[int(i)] for i in order.batch(rows.tokens_per_row, 8, 5, 9, 1)]
    with torch.no_grad():
        found = sum(ptx.losses(Root(actor), 5, metrics))
        expected = task.loss(actor, chosen) / task.terms(chosen)
    close(found, 3 * expected)
    assert sum(values["ptx_loss"] for values in metrics) == pytest.approx(float(expected), rel=1e-5)


NARROW = {"clip_range": 1e-4, "value_clip_range": 1e-4}  # what is not as it was is outside
STILL = {
    "actor": {"learning_rate": 0.0}, "critic": {"learning_rate": 0.0}, "ppo_epochs": 2, "mini_batches": 4,
    **NARROW,
}  # fmt: skip
ADAPTIVE = {
    "actor": {"learning_rate": 1e-3}, "iterations": 3, "kl_coef": 0.3, "kl_target": 1e-3, "kl_horizon": 80
}  # fmt: skip
CASES = {
    "still": STILL,
    "still-cooler": {**STILL, "temperature": 0.7},
    "adaptive": ADAPTIVE,
    "critic-still": {"actor": {"learning_rate": 1e-3}, "critic": {"learning_rate": 0.0}},
}


@pytest.fixture(scope="module")
def made(actor_path, tmp_path_factory):
    """Return name of a case -> directory of what it made."""
    root = tmp_path_factory.mktemp("ppo")
    models.new_scorer(actor_path, torch.float32, trainings.PAD, seed=3).save_pretrained(root / "scorer")
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
def test_without_learning_ratios_are_1_and_divergences_0(made, name):
    """To 1e-5: a mini-batch is computed in other company than its rollout. Weights keep their bits."""
    lines = metrics_of(made[name])
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


def test_a_lower_temperature_draws_other_replies_from_less_entropy(made):
    for one, cooler in zip(*(metrics_of(made[name]) for name in ("still", "still-cooler")), strict=True):
        assert cooler["entropy"] < 0.9 * one["entropy"]
        assert cooler["score_raw"] != pytest.approx(one["score_raw"], abs=1e-3)  # of the same noise


def test_without_learning_weights_keep_their_bits(made):
    for role, source in (("model", "actor"), ("critic", "scorer")):
        before, after = weights(made["sources"][source]), weights(made["still"] / role)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_actor_and_critic_have_learning_rates_of_their_own(made):
    """The critic's is 0; the actor's first steps of Adam are as long as its rate."""
    path, sources = made["critic-still"], made["sources"]
    before, after = weights(sources["scorer"]), weights(path / "critic")
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = weights(sources["actor"]), weights(path / "model")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert all(line["actor_learning_rate"] == 1e-3 for line in metrics_of(path))


def test_an_adaptive_coefficient_follows_the_divergence_and_is_taken_up_again(made):
    """Below the target it falls, above it rises, by at most 0.2 times 16 samples over a horizon of 80."""
    lines = metrics_of(made["adaptive"])
    below, above = lines[0]["kl_ref"], lines[1]["kl_ref"]
    assert below < 0.8 * ADAPTIVE["kl_target"] < 1.2 * ADAPTIVE["kl_target"] < above
    coefficients = [line["kl_coef"] for line in lines]
    assert coefficients == pytest.approx([0.3, 0.3 * 0.96, 0.3 * 0.96 * 1.04], rel=1e-6)
    for line in lines[1:]:
        assert line["non_score_reward"] == pytest.approx(-line["kl_coef"] * line["kl_ref"], rel=1e-4)
    again = metrics_of(made["adaptive"] / "again")  # from the state after two iterations
    assert again == lines
