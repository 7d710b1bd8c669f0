"""Optimizer steps: the learning rate's schedule, clipping, and which weights decay."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import trainings
from safetensors.torch import load_file

from rlhf.config import training
from rlhf.errors import DivergenceError, UserError
from rlhf.training import engine

STEPS = 40


def factors(steps=STEPS, **changes):
    """Return the learning rate of every step over the peak."""
    optimizer = training.Optimizer(
        **{
            "learning_rate": 0.5,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "max_grad_norm": 1.0,
            "schedule": "cosine",
            "warmup_steps": 10,
            "final_ratio": 0.2,
            **changes,
        }
    )
    return [engine.lr_factor(optimizer, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 10}, {"warmup_steps": None, "warmup_ratio": 0.25}])
def test_the_learning_rate_rises_linearly_to_the_peak_and_falls_to_its_end(schedule, warmup):
    found = factors(schedule=schedule, **warmup)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10] == max(found) == 1
    assert all(after < before for before, after in itertools.pairwise(found[10:]))
    assert found[25] == pytest.approx((1 + 0.2) / 2)  # halfway in time, halfway between peak and end
    assert found[STEPS] == pytest.approx(0.2)


def test_linear_falls_evenly_and_cosine_slowly_at_both_ends():
    line, cosine = (
        [b - a for a, b in itertools.pairwise(factors(schedule=s)[10:])] for s in ("linear", "cosine")
    )
    assert line == pytest.approx([line[0]] * 30)
    assert max(cosine[0], cosine[-1]) < 0 > min(cosine)
    assert abs(cosine[0]) < abs(line[0]) / 5 > abs(cosine[-1])
    assert abs(cosine[15]) > abs(line[15])


def test_a_constant_rate_stays_at_the_peak_and_without_warmup_begins_there():
    assert factors(schedule="constant", warmup_steps=0) == [1.0] * (STEPS + 1)
    assert factors(schedule="constant")[10:] == [1.0] * 31
    assert factors(warmup_steps=0)[0] == 1


# An eps far above every gradient makes a first step of AdamW the gradient, times learning rate / eps.
PLAIN = {"learning_rate": 1.0e6, "eps": 1.0e6, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0}
STILL = {**PLAIN, "learning_rate": 0.5, "eps": 1.0e12, "weight_decay": 0.1, "max_grad_norm": 1.0}
LINE = {"schedule": "linear", "warmup_steps": 2, "final_ratio": 0.5, "learning_rate": 1.0e-3}
CLIP = 0.01  # a gradient's norm, far below that of a random model


def case(name, optimizer, steps=1, zero=0):
    return {
        "name": name,
        "stage": "sft",
        "changes": {"steps": steps, "optimizer": optimizer, "run": {"zero_stage": zero}},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a GPU")
def test_a_training_that_requires_a_gpu_does_not_fall_back_to_the_cpu():
    run = trainings.settings("sft", {"run": {"gpus": 1}}).run
    with pytest.raises(UserError, match=r"run\.gpus = 1, but torch .* sees no GPU"):
        engine.start(run)


@pytest.fixture(scope="module")
def results(actor_path, tmp_path_factory):
    """Return name of a case -> directory of its results."""
    root = tmp_path_factory.mktemp("optimizer")
    trainings.write_rows(root / "data/sft", "sft", vocabulary=64)
    cases = [case("decay", STILL), case("line", LINE, steps=6), case("short", {"warmup_steps": 7}, steps=6)]
    for zero in (0, 2, 3):
        cases.append(case(f"whole-{zero}", {**PLAIN, "max_grad_norm": 1.0e6}, zero=zero))
        cases.append(case(f"clipped-{zero}", {**PLAIN, "max_grad_norm": CLIP}, zero=zero))
    sources = {"actor": actor_path, "scorer": actor_path, "data": root / "data"}
    out = trainings.launch(root, 1, sources, cases)
    return {c["name"]: out / c["name"] for c in cases}


def moved(path, actor):
    """Return by how much a training moved all weights, as one vector."""
    after = load_file(path / "model/model.safetensors")
    before = actor.state_dict()
    return torch.cat([(after[name] - before[name]).flatten().double() for name in after])


def metrics_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gradient_is_clipped_to_its_norm_and_keeps_its_direction(results, actor, zero):
    """The norm before clipping is reported; a gradient below the limit is not changed."""
    whole, clipped = (moved(results[f"{name}-{zero}"], actor) for name in ("whole", "clipped"))
    (metrics,) = metrics_of(results[f"clipped-{zero}"])
    assert metrics["grad_norm"] > 10 * CLIP
    assert whole.norm() == pytest.approx(metrics["grad_norm"], rel=1e-3)
    assert clipped.norm() == pytest.approx(CLIP, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(whole, clipped, dim=0) > 0.999


def test_matrices_decay_without_a_gradient_and_vectors_do_not(results, actor):
    """Matrices by learning rate times decay; norms, which are 1, would visibly shrink."""
    before = actor.state_dict()
    for name, after in load_file(results["decay"] / "model/model.safetensors").items():
        kept = 1 - 0.5 * 0.1 if after.dim() >= 2 else 1.0
        torch.testing.assert_close(after, kept * before[name], msg=name)


def test_a_training_follows_its_schedule(results):
    rates = [line["learning_rate"] for line in metrics_of(results["line"])]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.875e-3, 0.75e-3, 0.625e-3])


def test_a_warmup_longer_than_the_training_is_warned_of(results):
    assert (results["short"] / "warnings.txt").read_text().splitlines() == [
        "a warm-up of 7 steps in a training of 6: the peak learning rate is not reached"
    ]
    assert (results["line"] / "warnings.txt").read_text() == ""


@pytest.mark.parametrize(
    ("steps", "fp16", "said"),
    [
        (0, False, "at step 0, before anything was learned: the weights"),
        (3, False, "at step 3: the training stops here; lower the learning rate$"),
        (3, True, "lower the learning rate, or train in bf16 or fp32$"),
    ],
)
def test_the_remedy_against_numbers_that_are_not_finite_follows_from_the_step(steps, fp16, said):
    losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    trained = SimpleNamespace(
        global_steps=steps,
        fp16_enabled=lambda: fp16,
        micro_batch_losses=losses,
        gradient_accumulation_steps=lambda: len(losses),
    )
    with pytest.raises(DivergenceError, match=f"^the loss is nan .*{said}"):
        engine.step(trained)
