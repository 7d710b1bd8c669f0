"""What fits: micro-batch, generation batch and checkpointing, where the configuration says `auto`.

A simple estimate of the memory of one process, with a margin. Explicit values are obeyed. What is chosen changes
results by rounding only, and an artefact's name does not depend on it. It depends on the whole memory of
the device, not on what is free, so that a resumed training computes as before.

Source of the activations' size: Korthikanti et al. 2022, section 4.1, without dropout and attention weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from rlhf import parallel
from rlhf.config.stages import Eval, Rlhf, Training
from rlhf.config.training import RlhfRun, Run
from rlhf.models.graphs import LARGEST
from rlhf.models.outputs import LOGITS, LOGITS_OF_KERNEL

logger = logging.getLogger(__name__)

MARGIN = 0.1  # of the device's memory: CUDA's context, fragmentation, what the estimate leaves out
ENOUGH = 16384  # tokens of a micro-batch; more of them are not faster
FEW = 4096  # tokens; a micro-batch of fewer is slower than recomputing activations
IN_GRAPHS = 1.45  # a graph's pool over what the backward pass needs, measured with OPT-1.3B on an H100
AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(frozen=True)
class Size:
    """What a model needs, in bytes per process."""

    weights: int
    training: int  # gradients, the optimizer's moments and 32-bit weights
    per_token: int  # activations that a backward pass needs
    checkpointed: int  # the same, where each layer's are recomputed
    layer: int  # activations of one layer, per token
    cache: int  # keys and values of one token, of all layers

    def activations(self, tokens: int, *, recomputed: bool) -> int:
        """Return bytes of the activations of a micro-batch of `tokens`."""
        return tokens * (self.checkpointed + self.layer if recomputed else self.per_token)


def size_of(model: Any, run: Run, *, trained: bool) -> Size:
    """Estimate what a model needs, which has its adapters already."""
    config, width = model.config, model.dtype.itemsize
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "ffn_dim", None) or getattr(config, "intermediate_size", 4 * hidden)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    weights = _count(model.parameters()) * width // (parallel.world_size() if run.zero_stage == 3 else 1)
    learned = _count(p for p in model.parameters() if p.requires_grad) if trained else 0
    # In 16 bits: gradients as computed, and in 32 bits weights, moments and gradients.
    optimizer = learned * (8 if width == 4 else 16) // (parallel.world_size() if run.zero_stage else 1)
    layer = width * (8 * hidden + _kept_by_mlp(config) * inner)
    has_graphs = parallel.device().type == "cuda" and width == 2 and run.zero_stage < 3
    return Size(
        weights=weights,
        # Graphs have a second buffer of gradients.
        training=2 * learned * width + (0 if "optimizer" in run.offload else optimizer),
        per_token=int(layers * layer * (IN_GRAPHS if has_graphs else 1)),
        checkpointed=layers * width * hidden,
        layer=layer,
        cache=2 * layers * width * hidden * shared // heads,
    )


def _kept_by_mlp(config: Any) -> int:
    """Return how many tensors of an MLP's inner width a backward pass needs."""
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", "gelu")
    if activation == "relu":
        return 1  # its gradient follows from its output
    return 4 if activation == "silu" else 2  # a gate: both products, the activation, their product


def _count(parameters: Iterator[nn.Parameter]) -> int:
    """Return the number of weights; under ZeRO-3 of the whole model."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def usable_bytes(run: Run) -> int:
    """Return the bytes that a process may use."""
    device = parallel.device()
    if device.type == "cuda":
        return int((1 - MARGIN) * torch.cuda.get_device_properties(device).total_memory)
    return int((1 - MARGIN) * run.mem_mb * 10**6 * run.nodes / run.processes)


def fitted_training(model: Any, config: Training, longest: int, mean: float) -> Training:
    """Return the configuration of SFT or the reward stage with its `auto`s decided.

    Args:
        model: with its adapters, before there is an engine.
        longest: tokens of the longest row, of which a batch may consist.
        mean: tokens of a row on average, on which speed depends.
    """
    run = config.run
    size = size_of(model, run, trained=True)
    rows = config.train_batch_size // run.processes
    fixed = size.weights + size.training + logits_bytes(model)
    return config.model_copy(update={"run": _fitted(run, size, fixed, rows, (longest, mean))})


def fitted_rlhf(models: Sequence[Any], frozen: Sequence[Any], config: Rlhf) -> Rlhf:
    """Return the PPO stage's configuration with its `auto`s decided.

    Args:
        models: actor and critic, with their adapters, before there are engines.
        frozen: the reward model and, where there is one, the reference model.
    """
    run = config.run
    actor, critic = (size_of(model, run, trained=True) for model in models)
    kept = [size_of(model, run, trained=False) for model in frozen]
    fixed = sum(s.weights + s.training for s in (actor, critic)) + sum(s.weights for s in kept)
    # Sharded weights have no copy beside them while they are trained.
    fixed += (actor.weights if run.zero_stage < 3 else 0) + logits_bytes(models[0])
    per_row = config.max_prompt_tokens + config.max_new_tokens
    share = config.rollout_batch_size // run.processes
    run = run.model_copy(update={"generation_batch_size": _generated(run, actor, fixed, share, per_row)})
    fixed += run.generation_rows * per_row * actor.cache
    largest = max(actor, critic, key=lambda size: size.per_token)
    run = _fitted(run, largest, fixed, share // config.mini_batches, (per_row, per_row))
    return config.model_copy(update={"run": run})


def fitted_comparison(models: Sequence[Any], config: Eval, run: RlhfRun, prompt: int) -> RlhfRun:
    """Return how the comparison is executed, with its `auto`s decided; nothing is trained in it.

    Args:
        models: an actor first.
        prompt: tokens of the longest prompt.
    """
    sizes = [size_of(model, run, trained=False) for model in models]
    per_row, share = prompt + config.max_new_tokens, math.ceil(config.prompts / run.processes)
    fixed = sum(s.weights for s in (*sizes, sizes[0])) + logits_bytes(models[0])  # its decode copy too
    rows = _generated(run, sizes[0], fixed, share, per_row)
    micro = max(1, FEW // per_row) if run.micro_batch_size == "auto" else run.micro_batch_size
    return run.model_copy(update={"generation_batch_size": rows, "micro_batch_size": micro})


def logits_bytes(model: Any) -> int:
    """Return bytes of a chunk of logits and what is computed from them."""
    if parallel.device().type == "cuda":
        return LOGITS_OF_KERNEL * model.config.vocab_size * 2 * model.dtype.itemsize
    return LOGITS * model.config.vocab_size * 14  # in 16 bits and, log-probs and gradient too, in 32


def _generated(run: RlhfRun, actor: Size, fixed: int, share: int, per_row: int) -> int:
    """Return how many responses are sampled at a time: all, if their cache leaves three quarters of the rest."""
    if run.generation_batch_size != "auto":
        return run.generation_batch_size
    room = (usable_bytes(run) - fixed) // 4
    return max(1, min(share, room // (per_row * actor.cache)))


def _fitted(run: AnyRun, size: Size, fixed: int, rows: int, tokens: tuple[int, float]) -> AnyRun:
    """Return `run` with the fastest micro-batch and checkpointing that fit; say what was chosen.

    Args:
        tokens: of the longest row, and of a row on average.
    """
    sizes = [run.micro_batch_size] if run.micro_batch_size != "auto" else _divisors(rows)
    ways = [run.gradient_checkpointing] if run.gradient_checkpointing != "auto" else [False, True]
    if run.micro_batch_size != "auto" and run.gradient_checkpointing != "auto":
        return run
    available, (longest, mean) = usable_bytes(run), tokens

    def need(recomputed: bool, count: int) -> int:
        # Batches that are too large for graphs are computed beside the graphs' memory.
        beside = LARGEST if getattr(run, "packing", False) and count > LARGEST and not recomputed else 0
        return fixed + size.activations(count + beside, recomputed=recomputed)

    found = [(way, micro, need(bool(way), micro * longest)) for way in ways for micro in sizes]
    fitting = [choice for choice in found if choice[2] <= available]
    quick = [c for c in fitting if min(FEW, sizes[0] * mean) <= c[1] * mean <= ENOUGH]
    recomputed, micro, bytes_needed = next(iter(quick or fitting), found[-1])
    logger.info(
        "auto: micro-batches of %d, %s, about %.1f of %.1f GiB%s",
        micro,
        "activations recomputed" if recomputed else "nothing recomputed",
        bytes_needed / 2**30,
        available / 2**30,
        "" if bytes_needed <= available else ": it may not fit: by this estimate even one row is too much",
    )
    return run.model_copy(update={"micro_batch_size": micro, "gradient_checkpointing": recomputed})


def _divisors(count: int) -> list[int]:
    """Return the divisors of a number, the largest first."""
    return [n for n in range(count, 0, -1) if count % n == 0]
