"""The generation engine on a GPU: its kernels by their references, its graph by the loop without one."""

from __future__ import annotations

import families
import pytest
import torch

from rlhf.config.training import Lora
from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import pad
from rlhf.generation import attention, decoder
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Sampling, draw, logprobs_of, sample, uniforms
from rlhf.models import lora
from rlhf.models.outputs import response_logprobs
from rlhf.training.ppo_math import sampling_mismatch
from rlhf.training.rollout import compacted, scatter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PAD, EOS, NEVER = 1, 2, -1
LENGTHS = (3, 9, 5, 14, 4, 8, 6, 11)
BF16, FP32 = torch.bfloat16, torch.float32


def on_gpu(name, dtype=FP32):
    return families.tiny(name).to("cuda", dtype)


def prompts_of(lengths=LENGTHS):
    noise = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (n,), generator=noise, dtype=torch.int32).numpy() for n in lengths]


def sampled(model, sampling, rows=8, times=1):
    sampler, prompts = Sampler(model, sampling), prompts_of()
    sampler.refresh()
    noise = uniforms(Stream(3, Purpose.ROLLOUT), range(len(prompts)), sampling.max_new_tokens)
    for _ in range(times):
        (generated,) = sampler.generate(prompts, noise, rows)
    return generated


def tokens_of(generated):
    masks = generated.response_mask
    return [row[mask].tolist() for row, mask in zip(generated.responses, masks, strict=True)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (6, 3, 16), (2, 1, 256)])
def test_the_decoding_kernel_is_its_reference(heads, kv_heads, dim, dtype):
    from rlhf.generation import kernels

    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 63, 64, 65, 200, 255], device="cuda")
    keys, values = (torch.randn(7, kv_heads, 256, dim, device="cuda", dtype=dtype) for _ in range(2))
    qkv = torch.randn(7, heads + 2 * kv_heads, dim, device="cuda", dtype=dtype)
    parts = qkv.split([heads, kv_heads, kv_heads], 1)
    caches = [(keys.clone(), values.clone()) for _ in range(2)]
    ours = kernels.decode(*caches[0], lengths, parts, dim**-0.5)
    theirs = attention.decode_by_mask(*caches[1], lengths, parts, dim**-0.5)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == FP32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("channels", [32, 96, 2048])
def test_the_norm_kernel_is_its_reference(channels, rms, dtype):
    from rlhf.generation import kernels

    torch.manual_seed(0)
    x, added = (torch.randn(5, channels, device="cuda", dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(channels, device="cuda", dtype=dtype) for _ in range(2))
    norm = decoder.Norm(weight, None if rms else bias, 1e-5, rms)
    total, out = x + added, norm(x + added)
    ours = kernels.add_norm(x, added, norm.weight, norm.bias, norm.eps, rms)
    assert torch.equal(x, total)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == FP32 else {"atol": 4e-2, "rtol": 2e-2}
    torch.testing.assert_close(ours, out, **tolerance)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_tokens_in_fp32_are_those_of_transformers(name):
    model, batch = on_gpu(name), pad(prompts_of(), PAD, side="left").to("cuda")
    theirs = model.generate(
        input_ids=batch.ids, attention_mask=batch.mask.long(), do_sample=False, max_new_tokens=20,
        eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    assert torch.equal(sampled(model, Sampling(20, 0, EOS, PAD)).batch.ids, theirs)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_graph_and_no_graph_slots_and_used_slots_give_the_same_tokens(name, monkeypatch):
    model, sampling = on_gpu(name), Sampling(40, 1.0, EOS, PAD)
    graph = tokens_of(sampled(model, sampling, times=2))
    assert tokens_of(sampled(model, sampling, rows=3)) == graph
    monkeypatch.setattr(attention, "has_kernel", lambda *_: False)
    assert tokens_of(sampled(model, sampling)) == graph


def test_a_graph_uses_weights_that_changed_between_rollouts():
    model, sampling = on_gpu("opt"), Sampling(20, 1.0, EOS, PAD)
    sampler, prompts = Sampler(model, sampling), prompts_of()
    noise = uniforms(Stream(3, Purpose.ROLLOUT), range(len(prompts)), 20)
    sampler.refresh()
    (before,) = sampler.generate(prompts, noise, len(prompts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sampler.refresh()
    (after,) = sampler.generate(prompts, noise, len(prompts))
    assert tokens_of(after) == tokens_of(sampled(model, sampling)) != tokens_of(before)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_in_bf16_sampler_and_trainer_are_one_policy(name, adapters, figure):
    model = on_gpu(name, BF16)
    if adapters:
        lora.add(model, Lora(dim=4, alpha=4.0, learning_rate=1.0), seed=1)
        with torch.no_grad():
            for layer in lora.layers(model).values():
                layer.lora_B.normal_(std=0.05)
    generated = sampled(model, Sampling(40, 1.0, NEVER, PAD))
    batch, labels = compacted(
        generated.batch, generated.response_mask, torch.arange(len(LENGTHS), device="cuda")
    )
    with torch.no_grad():
        trained = scatter(response_logprobs(model, batch, labels), generated.response_mask)
    found = sampling_mismatch(generated.logprobs, trained, generated.response_mask)
    said = ", ".join(f"{key.removeprefix('sampler_')} {float(value):.2e}" for key, value in found.items())
    figure(f"{name}{' with adapters' if adapters else ''}: sampler and trainer in bf16: {said}")
    assert abs(float(found["sampler_kl"])) < 1e-3


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocabulary", [3, 2048, 2049, 50_272])
def test_the_drawing_kernel_is_its_reference(vocabulary, dtype):
    torch.manual_seed(0)
    logits = 3 * torch.randn(256, vocabulary, device="cuda", dtype=dtype)
    noise = torch.rand(256, device="cuda", dtype=torch.double)
    tokens, logprobs = sample(logits, 0.7, noise)
    expected = draw(logits, 0.7, noise)
    # Noise that falls on the boundary of two tokens, within rounding, may go to either.
    assert (tokens != expected).sum() <= 1
    torch.testing.assert_close(logprobs, logprobs_of(logits, tokens, 0.7), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_the_drawing_kernel_never_draws_what_is_impossible(noise):
    logits = torch.full((2, 5000), float("-inf"), device="cuda")
    logits[:, [7, 2500]] = 0.0
    tokens, _ = sample(logits, 1.0, torch.full((2,), noise, device="cuda", dtype=torch.double))
    assert tokens.tolist() == [7 if noise == 0 else 2500] * 2


def test_tokens_drawn_in_bf16_are_distributed_as_the_model_says():
    """A chi-square test of 200,000 draws; both bounds hold in all but one of a million runs."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4096, device="cuda", dtype=BF16)
    noise = torch.rand(200_000, device="cuda", dtype=torch.double)
    parts = [sample(logits.expand(len(n), -1), 1.0, n)[0] for n in noise.split(20_000)]
    found = torch.cat(parts).bincount(minlength=4096).double()
    expected = len(noise) * logits[0].double().softmax(-1)
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert abs(statistic - 4095) < 5 * (2 * 4095) ** 0.5
