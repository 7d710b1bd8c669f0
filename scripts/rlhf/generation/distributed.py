"""Sampling responses to many prompts, shared among the processes of a training."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf import parallel
from rlhf.config.batch import exact_div
from rlhf.config.training import RlhfRun
from rlhf.data.rows import Ids
from rlhf.data.streams import Stream
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Generated, uniforms


def sample(sampler: Sampler, prompts: Sequence[Ids], stream: Stream, run: RlhfRun) -> list[Generated]:
    """Return this process's share of the responses to all prompts; all processes call it together.

    Shares are consecutive and in the order of `prompts`; shapes are those of `Generated`. A response depends
    on its sample number, which is its prompt's index, not on the process that samples it. The processes of
    a group compute their shares together.

    Raises:
        ValueError: the prompts cannot be divided evenly among the processes.
    """
    share = exact_div(len(prompts), parallel.world_size(), "prompts over processes")
    group = sampler.group
    numbers = [rank * share + i for rank in group.ranks for i in range(share)]
    noise = uniforms(stream, numbers, sampler.sampling.max_new_tokens)
    rows = run.generation_rows * group.size
    generated = sampler.generate([prompts[n] for n in numbers], noise, rows)
    if group.size == 1:
        return generated
    (whole,) = generated  # families that a group can divide have a layout
    return [whole.rows(slice(group.position * share, (group.position + 1) * share))]
