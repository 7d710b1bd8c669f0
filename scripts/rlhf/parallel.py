"""The processes of one training, and torch's collectives over them.

With one process every function returns its argument.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def device() -> torch.device:
    """Return this process's device."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """End this process, if it is one of several, once all are here.

    Call it last: it skips Python's own shutdown. There, threads of the backend may abort the process
    (SIGABRT, seen with gloo about once in a hundred runs), and torchrun would report a failed training.
    """
    if world_size() > 1:
        barrier()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's items: every `world_size`-th one, so that sorted items are spread evenly."""
    return items[rank() :: world_size()]


def all_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Return each value summed over all processes, in double precision."""
    if world_size() == 1:
        return dict(values)
    sums = torch.tensor(list(values.values()), dtype=torch.double, device=device())
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def all_max(numbers: Sequence[int]) -> list[int]:
    """Return the largest value of each number over all processes."""
    if world_size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, device=device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [int(n) for n in found]


def all_gather_rows(x: Tensor) -> Tensor:
    """Return (W * N, ...) from (N, ...): the rows of all W processes, by rank; shapes are equal."""
    if world_size() == 1:
        return x
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent.contiguous())
    return torch.cat(received).to(x.dtype)


def all_gather_objects(items: list[Item]) -> list[Item]:
    """Return the items of every process, by rank; they are small and can be pickled."""
    if world_size() == 1:
        return items
    received: list[Any] = [None] * world_size()
    dist.all_gather_object(received, items)
    return [item for part in received for item in part]


def broadcast_object(value: Item) -> Item:
    """Return rank 0's value, which is small and can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


@dataclass(frozen=True)
class Group:
    """Processes of consecutive ranks that compute one thing together."""

    ranks: range
    handle: Any  # torch's group; None with one process

    @property
    def size(self) -> int:
        """Number of its processes."""
        return len(self.ranks)

    @property
    def position(self) -> int:
        """This process's number among them, from 0."""
        return self.ranks.index(rank())


@cache
def group(size: int) -> Group:
    """Return the group of `size` processes that this one belongs to; all processes call it together."""
    first = rank() // size * size
    handle = dist.new_subgroups(size)[0] if size > 1 else None
    return Group(range(first, first + size), handle)


def group_sum(x: Tensor, group: Group) -> Tensor:
    """Return `x`, any shape, summed over a group, in place: the same bits in each of its processes."""
    if group.size > 1:
        dist.all_reduce(x, group=group.handle)
    return x


def group_broadcast(x: Tensor, group: Group) -> Tensor:
    """Return the `x`, any shape, of a group's first process."""
    if group.size > 1:
        x = x.contiguous()
        dist.broadcast(x, group_src=0, group=group.handle)
    return x
