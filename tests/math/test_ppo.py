"""The loop of step 3: what a rollout asks for, and an iteration that learns nothing.

Formulae are tested in `test_ppo_math`, that micro-batches and processes change nothing in `test_processes`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import trainings
from safetensors.torch import load_file

from rlhf import models, ppo
from rlhf.rollout import Rollout
from rlhf.tokens import Padded

LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
MASK = torch.arange(4) < LENGTHS[:, None]
ENDED = torch.tensor([True, False, True, False, True, False])


def asked(scores, control=None, seed=0, **changes):
    """Return what `_targets` asks for each reply: without a critic or discount its return is its reward."""
    zeros = torch.zeros(MASK.shape)
    batch = Padded(
        torch.zeros(6, 7, dtype=torch.long), torch.cat([torch.ones(6, 3, dtype=torch.bool), MASK], 1)
    )
    seen = Rollout(batch, MASK, ENDED, zeros, zeros, zeros, torch.as_tensor(scores))
    config = trainings.settings("rlhf", {"gamma": 1.0, "gae_lambda": 1.0, **changes})
    control = control or ppo.Controller(score_mean=0.0, score_sd=1.0, kl_coef=0.1)
    targets, values = ppo._targets(seen, config, control, np.random.default_rng(seed))
    assert (targets.returns[~MASK] == 0).all()
    for row, length in zip(targets.returns, LENGTHS, strict=True):  # the same from every token on
        assert (row[:length] == row[0]).all()
    return targets.returns[:, 0], values


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
def still(actor_path, tmp_path_factory):
    """Return the directory of two iterations, of two epochs in four mini-batches, at learning rate 0."""
    root = tmp_path_factory.mktemp("still")
    models.new_scorer(actor_path, torch.float32, trainings.PAD, seed=3).save_pretrained(root / "scorer")
    trainings.write_rows(root / "data/rlhf", "rlhf", vocabulary=64)
    rate = {"learning_rate": 0.0}
    changes = {"actor": rate, "critic": rate, "ppo_epochs": 2, "mini_batches": 4}
    sources = {"actor": actor_path, "scorer": root / "scorer", "data": root / "data"}
    return trainings.launch(root, 1, sources, [{"name": "ppo", "stage": "rlhf", "changes": changes}]) / "ppo"


def test_without_learning_ratios_are_1_and_divergences_0(still):
    """To 1e-5: a mini-batch is computed in other company than its rollout. Weights keep their bits."""
    lines = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert line["ratio_mean_max"] == pytest.approx(1, abs=1e-5)
        for name in (
            "ratio_variance",
            "clip_fraction",
            "approx_kl",
            "first_approx_kl",
            "value_clip_fraction",
        ):
            assert line[name] == pytest.approx(0, abs=1e-8), name
        assert line["kl_ref"] == pytest.approx(0, abs=1e-5)
        assert line["actor_grad_norm"] > 0.01


def test_without_learning_weights_keep_their_bits(still, actor_path):
    before, after = load_file(actor_path / "model.safetensors"), load_file(still / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
