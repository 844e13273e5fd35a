"""What each row of a packed batch sees, as ranges of rows; the kernels' plans are made from these.

A row sees the past of its own segment and the whole of its segment's prefix. Where context parallelism cuts a segment,
the rows after the cut see what is before it in full, as if it were one more prefix.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastgrpo.kernels.row_share import RowShare

Range: TypeAlias = tuple[int, int]
"""Packed rows from the first number up to the second; empty where they are equal."""
Rows: TypeAlias = Tensor | slice
"""Rows of a tensor: their numbers, or a range, which is read and written without a copy."""


class Piece(NamedTuple):
    """Rows of one segment that are computed here. Each sees the rows of `own` up to itself, and all of the others.

    Example: Piece(own=(12, 20), earlier=(9, 12), prefix=(0, 7)).
    """

    own: Range
    earlier: Range
    """The same segment's rows before a cut; empty where context parallelism does not cut it."""
    prefix: Range

    @property
    def seen(self) -> tuple[Range, ...]:
        """What all of its rows see."""
        return tuple(range_ for range_ in (self.prefix, self.earlier) if range_[0] < range_[1])


def pieces_of(segments: Tensor, share: RowShare | None = None) -> list[Piece]:
    """The pieces of the segments that this rank computes, in the order of its rows.

    segments: (K, 4) int64: start, end, prefix_start, prefix_end (equal where there is no prefix), in row order.
    Raises ValueError where the segments do not follow each other or a prefix is not in the batch's rows.
    """
    rows = segments.tolist()
    num_rows, follows = rows[-1][1], 0
    for start, end, prefix_start, prefix_end in rows:
        if start != follows or end < start:
            raise ValueError(f"segments: [{start}, {end}) does not follow the segment that ends at {follows}")
        if not 0 <= prefix_start <= prefix_end <= num_rows:
            raise ValueError(f"segments: prefix [{prefix_start}, {prefix_end}) is outside [0, {num_rows})")
        follows = end
    return [
        Piece((begin, min(end, last)), (start, begin), (prefix_start, prefix_end))
        for first, last in (((0, num_rows),) if share is None else share.ranges)
        for start, end, prefix_start, prefix_end in rows
        if (begin := max(start, first)) < min(end, last)
    ]


def length(ranges: list[Range]) -> int:
    return sum(end - start for start, end in ranges)


def row_numbers(ranges: list[Range]) -> Tensor:
    """(length(ranges),) int64 on the CPU."""
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def compact(rows: Tensor, device: torch.device | str) -> Rows:
    """The row numbers as a range where they are one, else on the device."""
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return slice(first, first + count)
    return rows.to(device, non_blocking=True)


def take(x: Tensor, rows: Rows) -> Tensor:
    return x.narrow(0, rows.start, rows.stop - rows.start) if isinstance(rows, slice) else x.index_select(0, rows)


def add(total: Tensor, rows: Rows, part: Tensor) -> None:
    """total[rows] += part, also where a row is named twice."""
    take(total, rows).add_(part) if isinstance(rows, slice) else total.index_add_(0, rows, part)
