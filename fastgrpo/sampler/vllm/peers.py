"""The ranks of one engine take every step together: one that fails alone leaves the others waiting inside it."""

from __future__ import annotations

import itertools
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = timedelta(seconds=60)
"""Between the ends of a rollout on two ranks of an engine; they are a step apart at most."""
_rounds = itertools.count()


def end_together(num_ranks: int, *, failed: bool) -> bool:
    """Note that this rank's part of a rollout has ended, and tell whether all can go on to agree about it.

    num_ranks: of the engine, next to each other in the job. False where this one failed and others are still inside.
    """
    rank, store, this_round = dist.get_rank(), _get_default_store(), next(_rounds)
    store.set(f"fastgrpo/rollout-{this_round}/{rank}", "ended")
    if this_round:
        store.delete_key(f"fastgrpo/rollout-{this_round - 1}/{rank}")
    if failed:
        first = rank - rank % num_ranks
        try:
            store.wait([f"fastgrpo/rollout-{this_round}/{peer}" for peer in range(first, first + num_ranks)], PATIENCE)
        except dist.DistStoreError:
            return False
    return True
