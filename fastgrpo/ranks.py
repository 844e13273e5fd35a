"""This process's place among the processes of a job, all of which run the same loop (SPMD).

Data ranks hold copies of the policy and each samples and scores its share of a step's prompts; then every rank holds
all of them, so advantages, token weights and metrics are computed alike everywhere and need no further communication.
Ranks that together hold one copy (tensor, pipeline parallel) learn from the same micro-batches, and the first of them,
the copy's leader, samples for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastgrpo import network, parcel

T = TypeVar("T")
PIECE_BYTES = 256 << 20
"""Of a device's memory that a message takes, which may come while a sampler has all the rest."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Example, rank 5 of 8 with tp=2 pp=2: Ranks(rank=5, num_ranks=8, data_rank=1, num_data_ranks=2, leads=False)."""

    rank: int = 0
    num_ranks: int = 1
    data_rank: int = 0
    num_data_ranks: int = 1
    leads: bool = True
    """Whether this rank samples and scores for its copy of the policy."""
    in_step: bool = False
    """Whether data ranks must pass a learner equally many batches, because layers are cut over them too (experts):
    with another number on one of them all wait for ever."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs, the report and the checkpoint's manifest."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This data rank's part of what is dealt by index."""
        return slice(self.data_rank, None, self.num_data_ranks)

    def deal(self, items: Sequence[T], cost: Callable[[T], float]) -> list[list[T]]:
        """Every data rank's items, so that each gets about the same cost; in their order."""
        loads = [0.0] * self.num_data_ranks
        dealt: list[list[int]] = [[] for _ in loads]
        costs = [cost(item) for item in items]
        for index in sorted(range(len(items)), key=lambda index: -costs[index]):
            lightest = loads.index(min(loads))
            loads[lightest] += costs[index]
            dealt[lightest].append(index)
        return [[items[index] for index in sorted(share)] for share in dealt]

    def everyone(self, value: T) -> list[T]:
        """All ranks' values in their order, on every rank."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def gather(self, part: T) -> list[T]:
        """The leaders' parts in the order of their data ranks, on every rank.

        A broadcast a part: an all-gather would pad every rank's, also those of ranks without one, to the longest.
        """
        if self.num_ranks == 1:
            return [part]
        mine = parcel.pack(part) if self.leads else torch.empty(0, dtype=torch.uint8)
        leaders = sorted(
            (data_rank, rank, size)
            for rank, (leads, data_rank, size) in enumerate(self.everyone((self.leads, self.data_rank, len(mine))))
            if leads
        )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        parts = []
        for _, rank, size in leaders:
            message = mine if rank == self.rank else torch.empty(size, dtype=torch.uint8)
            for piece in message.split(PIECE_BYTES):
                sent = piece.to(device)
                dist.broadcast(sent, src=rank)
                if rank != self.rank:
                    piece.copy_(sent)
            parts.append(parcel.unpack(message))
        return parts

    def any_of(self, value: T | None) -> T | None:
        """The first rank's value that is not None, on every rank."""
        return next((found for found in self.everyone(value) if found is not None), None)

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank."""
        if self.num_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.num_ranks > 1:
            dist.barrier()


def started_by_torchrun() -> bool:
    """Whether this process is one of several, or torchrun's only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def join_job() -> Ranks:
    """Meet the other processes that torchrun started; until a learner says more, each is a data rank."""
    if not started_by_torchrun():
        return Ranks()
    # With tensor parallelism before Blackwell, the collectives are hidden only where one connection keeps their order.
    # It is read once, when the device is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        network.join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        data_rank=dist.get_rank(),
        num_data_ranks=dist.get_world_size(),
    )
