"""Which of a packed batch's rows each context-parallel rank computes.

The T rows are cut into 2n chunks, and rank r of n takes the r-th and the r-th from the end. A row attends to what is
before it, so early chunks are cheap and late ones dear, and these pairs cost alike (as in Llama 3, arXiv 2407.21783).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """One rank's rows. Example: RowShare(num_rows=8, num_ranks=2, rank=1).ranges == ((2, 4), (4, 6))."""

    num_rows: int
    """T, a multiple of 2n."""
    num_ranks: int
    rank: int

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two ranges of packed rows held here, in order."""
        size, mirrored = self.num_rows // (2 * self.num_ranks), 2 * self.num_ranks - 1 - self.rank
        return (self.rank * size, (self.rank + 1) * size), (mirrored * size, (mirrored + 1) * size)

    @property
    def rows(self) -> Tensor:
        """(T/n,) int64: the packed rows held here, in the order they are held in."""
        return torch.cat([torch.arange(start, end) for start, end in self.ranges])

    @property
    def held(self) -> slice:
        """Where these rows lie once the ranks' rows are gathered, one rank's after the other's."""
        size = self.num_rows // self.num_ranks
        return slice(self.rank * size, (self.rank + 1) * size)

    @property
    def gathered(self) -> Tensor:
        """(T,) int64: where each packed row lies once the ranks' rows are gathered, one rank's after the other's."""
        shares = [RowShare(num_rows=self.num_rows, num_ranks=self.num_ranks, rank=r) for r in range(self.num_ranks)]
        order = torch.cat([share.rows for share in shares])
        return torch.empty_like(order).scatter_(0, order, torch.arange(self.num_rows))
