"""Packed rows attended to by a kernel of variable length, as on a GPU: here the kernel is a loop.

Tolerance: 1e-4 in fp32, since sums are in another order.
"""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import fields
from itertools import pairwise

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trainings
from torch.nn.attention.varlen import varlen_attn

from rlhf.data.tokens import pack, pad, response_labels
from rlhf.models import loading, outputs, packing
from rlhf.training import reward, sft

PAD = 1
close = torch.testing.assert_close


def loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Attend sequence by sequence: `varlen_attn`, slowly."""
    assert window_size == (-1, 0)
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(end - start for start, end in pairwise(cu_seq_q.tolist()))
    parts = [[x[start:end].transpose(0, 1) for x in (query, key, value)] for start, end in pairwise(cu_seq_q)]
    return torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale).transpose(0, 1) for part in parts]
    )


@pytest.fixture(params=list(families.FAMILIES))
def path(request, tmp_path):
    families.tiny(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def both(load):
    """Return a model twice: one attends by mask, one by the loop."""
    by_mask, by_loop = load(), load()
    packing.use_kernel(by_loop, loop)
    assert (packing.uses_kernel(by_mask), packing.uses_kernel(by_loop)) == (False, True)
    return by_mask, by_loop


def test_boundaries_are_where_sequences_and_padding_begin(sequences):
    several = sequences(9, 14, 6, 11, 7, 2, 20)
    packed = pack([[s] for s in several], PAD, 25)
    numbers = packed.sequences.flatten()
    runs = [numbers[start:end] for start, end in pairwise(packed.boundaries.tolist())]
    assert all(len(run.unique()) == 1 for run in runs)
    found = {int(run[0]): len(run) for run in runs if run[0] >= 0}
    assert found == dict(enumerate(map(len, several)))
    assert packed.longest == max(map(len, runs))
    assert sum(map(len, runs)) == packed.ids.numel()
    assert (packed.boundaries[0], packed.boundaries.dtype) == (0, torch.int32)


def test_a_kernel_attends_to_what_the_mask_allows(path, sequences):
    several, prompts = sequences(9, 14, 6, 11, 7), [3, 5, 1, 2, 4]
    packed = pack([[s] for s in several], PAD, 25)
    labels = response_labels(prompts, packed)
    with torch.no_grad():
        expected, found = (
            outputs.response_logprobs(model.eval(), packed, labels)
            for model in both(lambda: loading.load_actor(path, torch.float32))
        )
    close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_model_with_a_kernel_reads_rows_padded_on_the_right_too(path, sequences):
    batch = pad(sequences(9, 14, 6), PAD, side="right")
    labels = response_labels([3, 5, 1], batch)
    by_mask, by_loop = both(lambda: loading.load_actor(path, torch.float32))
    with torch.no_grad():
        expected, found = (outputs.response_logprobs(m.eval(), batch, labels) for m in (by_mask, by_loop))
        close(found, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(AssertionError, match="padding before tokens"):
            outputs.response_logprobs(by_loop, pad(sequences(9, 14), PAD, side="left"), labels[:2])


def test_padded_rows_are_packed_into_one(sequences):
    several = sequences(9, 14, 6, 1)
    expected = pack([[s] for s in several], PAD, 30)
    found = pad(several, PAD, side="right").packed()
    for field in fields(expected):
        close(getattr(found, field.name), getattr(expected, field.name), msg=field.name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_padded_rows(path, sequences, checkpointing):
    columns = [sequences(*np.random.default_rng(s).integers(2, 12, 6), seed=s) for s in range(3)]
    pairs = [list(row) for row in zip(*columns, strict=True)]
    for load, task, rows, width in (
        (lambda: loading.load_actor(path, torch.float32), sft.task, [row[:2] for row in pairs], 24),
        (lambda: loading.new_scorer(path, torch.float32, PAD, seed=3), reward.task, pairs, 48),
    ):
        padded, packed = both(load)
        if checkpointing:
            packed.gradient_checkpointing_enable({"use_reentrant": False})
        trainings.loss(task(PAD), padded.train(), rows).backward()
        trainings.loss(task(PAD, width), packed.train(), rows).backward()
        found = dict(packed.named_parameters())
        for name, parameter in padded.named_parameters():
            if parameter.grad is not None:
                close(
                    found[name].grad, parameter.grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_the_attention_implementation_is_not_saved(path, tmp_path):
    by_mask, by_loop = both(lambda: loading.load_actor(path, torch.float32))
    for name, model in (("mask", by_mask), ("loop", by_loop)):
        model.save_pretrained(tmp_path / name)
    texts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("mask", "loop")]
    assert texts[0] == texts[1]


def test_without_kernels_the_mask_is_kept_and_the_log_says_so(path, caplog):
    model = loading.load_actor(path, torch.float32)
    before = model.config._attn_implementation
    with caplog.at_level(logging.INFO):
        packing.choose_attention(model, "bf16")
    assert model.config._attn_implementation == before
    assert (
        "attention by a block-diagonal mask (there are no kernels of variable length on cpu)" in caplog.text
    )


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "why_not"),
    [
        ({}, "bf16", (8, 0), None),
        ({}, "fp16", (9, 0), None),
        ({}, "fp32", (9, 0), "compute in 16 bits, dtype is fp32"),
        ({}, "bf16", (7, 5), "need a GPU of compute capability 8.0"),
        ({"sliding_window": 16}, "bf16", (9, 0), "a llama model has a different attention"),
        ({"model_type": "gemma2"}, "bf16", (9, 0), "a gemma2 model has a different attention"),
        ({"head_dim": 12}, "bf16", (9, 0), "do not support heads of 12 channels"),
        ({"head_dim": 512}, "bf16", (9, 0), "do not support heads of 512 channels"),
    ],
)
def test_kernels_are_used_where_they_support_the_model(monkeypatch, changes, dtype, capability, why_not):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = families.tiny("llama").config
    for name, value in changes.items():
        setattr(config, name, value)
    reason = packing._obstacle(config, dtype, torch.device("cuda"))
    assert reason is None if why_not is None else why_not in reason


def test_torchs_kernel_has_the_arguments_that_it_is_called_with():
    """It cannot run here; its signature is checked."""
    q = torch.zeros(3, 2, 8)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    inspect.signature(varlen_attn).bind(q, q, q, ends, ends, 3, 3, scale=1.0, window_size=(-1, 0))


def test_a_neighbour_changes_nothing(sequences):
    first, second, other = *sequences(9, 14), sequences(14, seed=1)[0]
    model = families.tiny("llama")
    packing.use_kernel(model, loop)
    with torch.no_grad():
        one, two = (
            model(**outputs.hidden_inputs(model, pack([[first, s]], PAD, 25))).logits for s in (second, other)
        )
    assert torch.equal(one[:, :9], two[:, :9])
    assert not torch.equal(one[:, 9:], two[:, 9:])
