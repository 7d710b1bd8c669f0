"""Sampling responses to many prompts, shared among the processes of a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from rlhf import parallel
from rlhf.config.batch import exact_div, slices
from rlhf.config.training import RlhfRun
from rlhf.data.rows import Ids
from rlhf.data.streams import Stream
from rlhf.data.tokens import pad
from rlhf.generation.engine import Generated, Sampling, generate, uniforms
from rlhf.parallel import Group


def respond(
    actor: Any, prompts: Sequence[Ids], sampling: Sampling, noise: Tensor, group: Group | None = None
) -> Generated:
    """Sample one response of a bare model to each prompt, on this process's device.

    Args:
        noise: (B, max_new_tokens) from `uniforms`, a row per prompt.
        group: as in `engine.generate`.
    """
    batch = pad(prompts, sampling.pad_id, side="left").to(parallel.device())  # (B, P)
    return generate(actor, batch, sampling, noise, group)


def sample(
    actor: Any, prompts: Sequence[Ids], sampling: Sampling, stream: Stream, run: RlhfRun
) -> Iterator[Generated]:
    """Yield this process's share of the responses to all prompts; all processes call it together.

    A response depends on its sample number, which is its prompt's place, not on the process that
    samples it. The processes of a group compute their shares together.

    Args:
        actor: from `sampling_copy`.

    Raises:
        ValueError: the prompts cannot be divided evenly among the processes.
    """
    share = exact_div(len(prompts), parallel.world_size(), "prompts over processes")
    group = parallel.group(run.inference_tp_size)
    for part in slices(share, run.generation_batch_size):
        numbers = [rank * share + i for rank in group.ranks for i in range(share)[part]]
        noise = uniforms(stream, numbers, sampling.max_new_tokens)
        generated = respond(actor, [prompts[n] for n in numbers], sampling, noise, group)
        own = exact_div(len(numbers), group.size, "responses of a group")
        yield generated.rows(slice(group.position * own, (group.position + 1) * own))
