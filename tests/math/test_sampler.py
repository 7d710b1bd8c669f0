"""The sampler: slots that are used again, weights that change, and the meter that compares it with the trainer."""

from __future__ import annotations

import copy

import families
import pytest
import torch

from rlhf.config.training import Lora
from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import pad
from rlhf.generation import attention, plain
from rlhf.generation.sampler import Sampler, generate
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models import families as model_families
from rlhf.models import lora
from rlhf.models.outputs import response_logprobs
from rlhf.training.health import BOUNDS
from rlhf.training.ppo_math import sampling_mismatch
from rlhf.training.rollout import compacted, scatter

PAD, EOS, NEVER, LENGTH = 1, 2, -1, 9
LENGTHS = (3, 9, 5, 14, 4, 8, 6)


@pytest.fixture
def actor(actor):
    """A copy that a test may change."""
    return copy.deepcopy(actor)


def noise_for(prompts, length=LENGTH):
    return uniforms(Stream(3, Purpose.ROLLOUT), range(len(prompts)), length)


def tokens_of(generated):
    masks = generated.response_mask
    return [row[mask].tolist() for row, mask in zip(generated.responses, masks, strict=True)]


def mismatch(model, generated, temperature=1.0):
    """Return what the meter says about a rollout of `generated`, and a trainer with the weights of `model`."""
    rows = torch.arange(len(generated.ended))
    batch, labels = compacted(generated.batch, generated.response_mask, rows)
    with torch.no_grad():
        trained = scatter(response_logprobs(model, batch, labels, temperature), generated.response_mask)
    found = sampling_mismatch(generated.logprobs, trained, generated.response_mask)
    return {name: float(value) for name, value in found.items()}


def sampled(model, prompts, sampling=None, rows=None):
    sampler = Sampler(model, sampling or Sampling(LENGTH, 1.0, EOS, PAD))
    sampler.refresh()
    (generated,) = sampler.generate(prompts, noise_for(prompts), rows or len(prompts))
    return generated


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("eos", [EOS, NEVER, 7])
def test_a_slot_that_is_used_again_changes_no_response(actor, sequences, rows, eos):
    prompts, sampling = sequences(*LENGTHS), Sampling(LENGTH, 1.0, eos, PAD)
    together, few = sampled(actor, prompts, sampling), sampled(actor, prompts, sampling, rows)
    assert tokens_of(few) == tokens_of(together)
    assert torch.equal(few.ended, together.ended)
    torch.testing.assert_close(few.logprobs, together.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_engine_samples_what_a_familys_own_forward_samples(name, sequences):
    model, prompts, sampling = families.tiny(name), sequences(*LENGTHS), Sampling(LENGTH, 1.0, EOS, PAD)
    engine = generate(model, prompts, sampling, noise_for(prompts))
    theirs = plain.generate(model, pad(prompts, PAD, side="left"), sampling, noise_for(prompts))
    assert tokens_of(engine) == tokens_of(theirs)
    assert torch.equal(engine.batch.ids, theirs.batch.ids)
    torch.testing.assert_close(engine.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
        {"layer_norm_elementwise_affine": False, "do_layer_norm_before": False},
        {"enable_bias": False},
    ],
)
def test_an_opt_of_another_make_is_sampled_as_its_own_forward_does(actor, sequences, changes):
    config = copy.deepcopy(actor.config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    model, prompts, sampling = (
        type(actor)(config).eval(),
        sequences(*LENGTHS),
        Sampling(LENGTH, 1.0, EOS, PAD),
    )
    engine = generate(model, prompts, sampling, noise_for(prompts))
    theirs = plain.generate(model, pad(prompts, PAD, side="left"), sampling, noise_for(prompts))
    assert tokens_of(engine) == tokens_of(theirs)
    torch.testing.assert_close(engine.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)


def test_weights_that_a_layout_does_not_know_are_not_left_out_in_silence(actor):
    actor.model.decoder.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"the layout of opt lacks model.decoder.layers.0.extra.weight"):
        Sampler(actor, Sampling(LENGTH, 1.0, EOS, PAD)).refresh()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_sampler_and_trainer_are_one_policy(name, sequences, temperature):
    model, sampling = families.tiny(name), Sampling(LENGTH, temperature, EOS, PAD)
    found = mismatch(model, sampled(model, sequences(*LENGTHS), sampling), temperature)
    assert abs(found["sampler_kl"]) < 1e-8
    assert found["sampler_diff_max"] < 1e-3
    assert found["sampler_outside"] == 0
    assert found["sampler_ess"] == pytest.approx(1)


def test_a_refresh_takes_the_weights_of_now_in_the_same_tensors(actor, sequences):
    prompts, sampler = sequences(*LENGTHS), Sampler(actor, Sampling(LENGTH, 1.0, EOS, PAD))
    sampler.refresh()
    (before,) = sampler.generate(prompts, noise_for(prompts), 4)
    places = [weight.target.data_ptr() for weight in sampler.weights()]
    move(actor)
    sampler.refresh()
    (after,) = sampler.generate(prompts, noise_for(prompts), 4)
    assert tokens_of(after) == tokens_of(sampled(actor, prompts)) != tokens_of(before)
    assert [weight.target.data_ptr() for weight in sampler.weights()] == places


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def is_out_of_bounds(found):
    bounds = [bound for bound in BOUNDS if bound.metric in found]
    assert {bound.metric for bound in bounds} >= {"sampler_kl", "sampler_outside", "sampler_ess"}
    return [bound.metric for bound in bounds if not bound.least <= found[bound.metric] <= bound.most]


def test_the_meter_sees_stale_weights(actor, sequences):
    generated = sampled(actor, sequences(*LENGTHS))
    assert is_out_of_bounds(mismatch(actor, generated)) == []
    move(actor)
    assert "sampler_kl" in is_out_of_bounds(mismatch(actor, generated))


def test_the_meter_sees_a_wrong_position(actor, sequences, monkeypatch):
    monkeypatch.setattr(model_families, "POSITION_OFFSET", 1)
    assert "sampler_kl" in is_out_of_bounds(mismatch(actor, sampled(actor, sequences(*LENGTHS))))


def test_the_meter_sees_a_wrong_mask(actor, sequences, monkeypatch):
    def decode(keys, values, lengths, qkv, scale):
        """Hide the newest token from itself."""
        keys[torch.arange(len(lengths)), :, lengths] = 0
        return right(keys, values, lengths - 1, (qkv[0], *(x * 0 for x in qkv[1:])), scale)

    right = attention.decode_by_mask
    monkeypatch.setattr(attention, "decode_by_mask", decode)
    assert "sampler_kl" in is_out_of_bounds(mismatch(actor, sampled(actor, sequences(*LENGTHS))))


def test_the_meter_sees_adapters_that_are_not_merged(actor, sequences, monkeypatch):
    lora.add(actor, Lora(dim=4, alpha=4.0, learning_rate=1.0), seed=1)
    with torch.no_grad():
        for layer in lora.layers(actor).values():
            layer.lora_B.normal_(std=0.3)
    assert is_out_of_bounds(mismatch(actor, sampled(actor, sequences(*LENGTHS)))) == []
    monkeypatch.setattr(lora.Source, "merged", lambda source: source.weight)
    assert "sampler_kl" in is_out_of_bounds(mismatch(actor, sampled(actor, sequences(*LENGTHS))))


def test_a_family_without_a_layout_is_sampled_by_its_own_forward(actor, sequences, monkeypatch, caplog):
    expected = tokens_of(sampled(actor, sequences(*LENGTHS)))
    monkeypatch.setattr(model_families, "LAYOUTS", {})
    caplog.set_level("INFO")
    sampler = Sampler(actor, Sampling(LENGTH, 1.0, EOS, PAD))
    sampler.refresh()
    prompts = sequences(*LENGTHS)
    parts = sampler.generate(prompts, noise_for(prompts), 3)
    assert [tokens for part in parts for tokens in tokens_of(part)] == expected
    assert "opt models are sampled by their own forward" in caplog.text
