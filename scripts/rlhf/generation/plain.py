"""Sampling by a model's own forward, a token at a time, for families without a layout (`families.LAYOUTS`).

It is slower than the engine, but right for every causal language model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from rlhf import parallel
from rlhf.data.tokens import Padded
from rlhf.generation.sampling import Generated, Sampling, assemble, sample
from rlhf.models import lora
from rlhf.models.outputs import evaluating
from rlhf.models.sharding import gathered_parameters, is_sharded


def sampling_copy(model: Any) -> Any:
    """Return a model that generates without other processes: itself, or a gathered copy if it is sharded.

    All processes call it together. The copy is filled parameter by parameter, so that at most one is
    gathered at a time.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        target = type(model)(copy.deepcopy(model.config))
    target = target.to(dtype=model.dtype).to_empty(device=parallel.device())
    target.tie_weights()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            source = lora.source(model, name)
            with gathered_parameters(source.parameters):
                parameter.copy_(source.merged())
        for ours, theirs in zip(target.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return target.eval()


def generate(model: Any, prompts: Padded, sampling: Sampling, noise: Tensor) -> Generated:
    """Sample one response to each prompt.

    Args:
        prompts: (B, P), padded on the left.
        noise: (B, max_new_tokens) float64 from `uniforms`; not used when greedy.
    """
    size, width = prompts.ids.shape
    length = sampling.max_new_tokens
    # Causality hides later places until they are written, so the mask is made once.
    attention = torch.cat([prompts.mask, prompts.mask.new_ones(size, length)], dim=1).long()
    tokens = prompts.ids.new_full((size, length), sampling.pad_id)  # (B, max_new_tokens)
    logprobs = torch.zeros(tokens.shape, device=tokens.device)  # (B, max_new_tokens)
    counts, running = prompts.ids.new_zeros(size), prompts.mask.new_ones(size)  # (B,)
    inputs, positions, noise = prompts.ids, prompts.positions, noise.to(tokens.device)
    cache = StaticCache(config=model.config, max_cache_len=width + length)
    with evaluating(model):
        for step in range(length):
            output = model(
                input_ids=inputs,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]  # (B, V)
            token, logprobs[:, step] = sample(logits, sampling.temperature, noise[:, step])  # (B,) each
            tokens[:, step] = torch.where(running, token, sampling.pad_id)
            counts += running
            running = running & (token != sampling.eos_id)
            if not running.any():
                break
            inputs, positions = tokens[:, step : step + 1], positions[:, -1:] + 1
    return assemble(prompts, tokens, counts, logprobs, sampling.eos_id)
