"""One rank's part of a vocabulary that tensor parallelism splits.

Ranks hold equal shards in rank order. Columns at and beyond `vocab_size` are padding: they take part in no
softmax and receive no gradient. A row's statistics cost one all-gather of 16 bytes a rank; every rank then
combines them in rank order, so all of them compute the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it; the old name warns there and the new one does not exist in 2.11
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class VocabShard:
    """first_column: the shard's first token id; num_valid: how many of its columns are tokens; vocab_size: all."""

    group: Any
    rank: int
    num_ranks: int
    first_column: int
    num_valid: int
    vocab_size: int

    @classmethod
    def of(cls, num_columns: int, vocab_size: int | None, group: Any) -> VocabShard:
        """The shard of a weight with num_columns rows on this rank. group: a process group, or None for one rank.

        Raises ValueError where vocab_size does not fit the shards.
        """
        rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        held = num_columns * num_ranks
        if vocab_size is None:
            vocab_size = held
        if not 1 <= vocab_size <= held:
            raise ValueError(f"vocab_size={vocab_size}: the weight's shards hold {held} rows; use 1 to {held}, or None")
        first = rank * num_columns
        return cls(group, rank, num_ranks, first, min(max(vocab_size - first, 0), num_columns), vocab_size)

    def gather(self, stats: Tensor) -> Tensor:
        """(n, 4) on every rank to (R, n, 4) in rank order: the one collective of the forward pass."""
        if self.num_ranks == 1:
            return stats[None]
        gathered = stats.new_empty(self.num_ranks * stats.shape[0], stats.shape[1])
        _all_gather(gathered, stats.contiguous(), group=self.group)
        return gathered.view(self.num_ranks, *stats.shape)

    def start_sum(self, partial: Tensor) -> list[dist.Work]:
        """Sum a contiguous tensor over the ranks in place; wait on what is returned before reading it."""
        if self.num_ranks == 1:
            return []
        work = dist.all_reduce(partial, group=self.group, async_op=True)
        assert work is not None
        return [work]


def check_hidden_and_weight(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raise ValueError where shapes, dtypes or devices of the three do not belong together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, H) and (V, H) with one H"
        )
    if targets.shape != (hidden.shape[0],):
        raise ValueError(f"targets {tuple(targets.shape)} must be ({hidden.shape[0]},): one for each row of hidden")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one to the other's dtype")
    if hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden.dtype}: use float32, bfloat16, float16, or float64 for tests")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden on {hidden.device}, weight on {weight.device}, targets on {targets.device}: move them together"
        )
