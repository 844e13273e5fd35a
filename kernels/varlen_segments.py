"""Attention over segments in two calls of a variable-length kernel, however many segments and lengths: a GPU's way.

The first is causal over the pieces, the second over what the pieces see beside themselves: neighbours that see the
same, a group's completions, are one sequence there, and rows that see nothing more a sequence without keys. So both
read all queries where they lie. Only the prefixes' keys and values are gathered, once a prefix, and only where several
prefixes lie apart.
"""

from __future__ import annotations

from itertools import accumulate, groupby

import torch
from torch import Tensor

from fastgrpo.kernels.merge_attention import merge_in_place
from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_pieces import Piece, Rows, add, compact, length, row_numbers, take
from fastgrpo.kernels.varlen_kernels import Sequences, VarlenKernel


class VarlenSegments:
    """The two calls for these pieces, and attention by them."""

    def __init__(
        self, pieces: list[Piece], share: RowShare | None, device: torch.device | str, kernel: VarlenKernel
    ) -> None:
        self.kernel = kernel
        lengths = [length([piece.own]) for piece in pieces]
        self.own = _sequences(lengths, lengths, device)
        self.own_rows = slice(0, sum(lengths)) if share is None else share.held
        """Where the keys of these queries lie among all keys."""
        alike = [(seen, list(group)) for seen, group in groupby(pieces, lambda piece: piece.seen)]
        self.seen: Sequences | None = None
        self.seen_rows: Rows = slice(0, 0)
        if any(seen for seen, _ in alike):
            queries = [length([piece.own for piece in group]) for _, group in alike]
            self.seen = _sequences(queries, [length(list(seen)) for seen, _ in alike], device)
            rows = row_numbers([range_ for seen, _ in alike for range_ in seen])
            self.seen_rows = compact(rows if share is None else share.gathered[rows], device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output (T, A, D) and its log-sum-exp (A, T)."""
        out, lse = self.kernel.forward(q, take(k, self.own_rows), take(v, self.own_rows), self.own, True, scale)
        if self.seen is None:
            return out, lse
        part, part_lse = self.kernel.forward(
            q, take(k, self.seen_rows), take(v, self.seen_rows), self.seen, False, scale
        )
        merge_in_place(out, lse, part, part_lse)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of forward's output; out and lse are forward's."""
        grad = grad.contiguous()
        keys, values = take(k, self.own_rows), take(v, self.own_rows)
        dq, *own = self.kernel.backward(grad, q, keys, values, out, lse, self.own, True, scale)
        dk, dv = (_spread(part, self.own_rows, x) for part, x in zip(own, (k, v), strict=True))
        if self.seen is not None:
            keys, values = take(k, self.seen_rows), take(v, self.seen_rows)
            part_dq, part_dk, part_dv = self.kernel.backward(grad, q, keys, values, out, lse, self.seen, False, scale)
            dq += part_dq
            add(dk, self.seen_rows, part_dk)
            add(dv, self.seen_rows, part_dv)
        return dq, dk, dv


def _sequences(queries: list[int], keys: list[int], device: torch.device | str) -> Sequences:
    cu_q, cu_k = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
    return Sequences(
        cu_q=cu_q.to(device, non_blocking=True),
        cu_k=cu_k.to(device, non_blocking=True),
        max_q=max(queries),
        max_k=max(keys),
    )


def _spread(part: Tensor, rows: slice, like: Tensor) -> Tensor:
    """The part as those rows of a tensor that is 0 elsewhere."""
    if len(part) == len(like):
        return part
    whole = torch.zeros_like(like)
    take(whole, rows).copy_(part)
    return whole
