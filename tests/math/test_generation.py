from __future__ import annotations

import pytest
import torch

from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import pad
from rlhf.generation.sampler import generate
from rlhf.generation.sampling import Sampling, draw, uniforms
from rlhf.models.outputs import response_logits, token_logprobs

PAD, EOS, NEVER = 1, 2, -1
LENGTH = 12


def respond(actor, prompts, temperature=1.0, eos=EOS, pad_id=PAD, seed=0, length=LENGTH, first=0):
    sampling = Sampling(length, temperature, eos, pad_id)
    noise = uniforms(Stream(seed, Purpose.PASS, first), range(len(prompts)), length)
    return generate(actor, prompts, sampling, noise)


def tokens_of(generated):
    """Return each response as a list, without its padding."""
    masks = generated.response_mask
    return [row[mask].tolist() for row, mask in zip(generated.responses, masks, strict=True)]


def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    found = torch.bincount(tokens, minlength=len(probabilities))
    possible = expected > 0
    assert (found[~possible] == 0).all()
    return float(((found - expected) ** 2 / expected)[possible].sum())


def test_greedy_responses_equal_those_of_transformers(actor, sequences):
    prompts = sequences(3, 9, 5, 1, 14, 7)
    eos = tokens_of(respond(actor, prompts, 0, NEVER))[0][4]  # so that some responses end
    generated = respond(actor, prompts, 0, eos)
    batch = pad(prompts, PAD, side="left")
    theirs = actor.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    assert generated.ended.any()
    assert torch.equal(generated.batch.ids, theirs)


def test_a_response_does_not_depend_on_the_other_prompts_of_its_batch(actor, sequences):
    prompts = sequences(3, 9, 5, 1, 14, 7)
    together = tokens_of(respond(actor, prompts))
    alone = [tokens_of(respond(actor, [p], first=i))[0] for i, p in enumerate(prompts)]
    assert together == alone


def test_another_sample_number_or_seed_gives_another_response(actor, sequences):
    prompts = sequences(5) * 3
    one, two = (
        tokens_of(respond(actor, prompts, eos=NEVER)),
        tokens_of(respond(actor, prompts, eos=NEVER, seed=1)),
    )
    assert len({tuple(response) for response in one + two}) == 6


def test_noise_of_a_sample_depends_on_its_number_alone():
    stream = Stream(7, Purpose.WINDOW)
    whole = uniforms(stream, range(6), 9)
    assert torch.equal(uniforms(stream, [4, 1], 9), whole[[4, 1]])
    assert torch.equal(uniforms(Stream(7, Purpose.WINDOW, first=2), [2, 0], 9), whole[[4, 2]])
    assert torch.equal(uniforms(stream, range(6), 4), whole[:, :4])
    assert not torch.equal(uniforms(Stream(7, Purpose.ROLLOUT), range(6), 9), whole)
    assert ((whole >= 0) & (whole < 1)).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
    noise = uniforms(Stream(0, Purpose.HEAD), range(20), 1000).flatten()
    tokens = draw(logits.expand(len(noise), -1), temperature, noise)
    assert chi_square(tokens, (logits.double() / temperature).softmax(-1)) < 24.3  # 7 df, p = 0.001


def test_first_tokens_of_responses_follow_the_models_distribution(actor, sequences):
    (prompt,) = sequences(5)
    generated = respond(actor, [prompt] * 4000, temperature=3.0, eos=NEVER, length=1)
    with torch.no_grad():
        logits = actor(torch.tensor(prompt[None], dtype=torch.long)).logits[0, -1]
    likely = (logits.double() / 3).softmax(-1)
    kept = likely > 5 / 4000  # rarer ones are counted together
    groups = torch.where(kept, kept.cumsum(0), 0)
    merged = torch.zeros(int(kept.sum()) + 1, dtype=torch.double).index_add_(0, groups, likely)
    assert chi_square(groups[generated.responses[:, 0]], merged) < 103.5  # at most 63 df, p = 0.001


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_no_probability_is_never_drawn(noise):
    logits = torch.full((1, 6), -torch.inf)
    logits[0, [2, 4]] = 0.0
    assert draw(logits, 1.0, torch.tensor([noise], dtype=torch.double)).item() in (2, 4)


def test_a_low_temperature_is_nearly_greedy():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    noise = uniforms(Stream(0, Purpose.PASS), range(50), 1)[:, 0]
    assert torch.equal(draw(logits, 1e-4, noise), draw(logits, 0, noise))


@pytest.mark.parametrize(("eos", "pad_id"), [(EOS, PAD), (0, PAD), (EOS, EOS), (0, 0)])
def test_a_response_ends_with_its_eos_and_only_padding_follows(actor, sequences, eos, pad_id):
    """EOS may be BOS (0, the first token of each prompt) and padding may be EOS."""
    prompts = sequences(3, 9, 5, 1, 14, 7, 4, 8)
    free = tokens_of(respond(actor, prompts, 30.0, NEVER, pad_id, length=40))
    generated = respond(actor, prompts, 30.0, eos, pad_id, length=40)
    assert generated.ended.any()
    for i, prompt in enumerate(prompts):
        response = tokens_of(generated)[i]
        end = free[i].index(eos) + 1 if eos in free[i] else len(free[i])
        assert response == free[i][:end]
        assert bool(generated.ended[i]) == (response[-1] == eos) == (eos in free[i])
        assert (generated.responses[i][len(response) :] == pad_id).all()
        assert generated.response_mask[i].tolist() == [
            k < len(response) for k in range(generated.response_mask.shape[1])
        ]
        assert generated.batch.ids[i][generated.batch.mask[i]].tolist() == [*prompt, *response]


def test_generation_stops_when_every_response_has_ended(actor, sequences):
    prompts = sequences(5, 5, 5)
    eos = tokens_of(respond(actor, prompts[:1], 0, NEVER))[0][0]
    generated = respond(actor, prompts[:1] * 3, 0, eos)
    assert generated.response_mask.shape == (3, 1)
    assert generated.ended.all()


def test_responses_are_as_wide_as_max_new_tokens_at_most(actor, sequences):
    generated = respond(actor, sequences(5, 9), eos=NEVER, length=7)
    assert generated.response_mask.shape == (2, 7)
    assert generated.response_mask.all()
    assert not generated.ended.any()


def test_steps_with_a_cache_agree_with_a_forward_over_the_whole_sequence(actor, sequences):
    """Greedy tokens are the most likely ones by the engine that trains, too."""
    generated = respond(actor, sequences(3, 9, 5, 14), 0, NEVER)
    with torch.no_grad():
        labels = torch.zeros_like(generated.batch.mask)
        labels[:, -LENGTH:] = True
        logits = response_logits(actor, generated.batch, labels)
    chosen = token_logprobs(logits, generated.responses.flatten())
    torch.testing.assert_close(chosen, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=1e-4)


def test_generating_leaves_the_model_as_it_was(actor, sequences):
    actor.train()
    try:
        respond(actor, sequences(3, 5))
        assert actor.training
    finally:
        actor.eval()
    assert all(p.grad is None for p in actor.parameters())
