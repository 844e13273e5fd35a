"""Row operations on a tile of logits in plain torch: the CPU path, and the Triton kernels' shape in slow motion.

A tile is (rows, V) in float32 or float64. Per row four numbers say everything the loss needs,
    m = max z,   l = sum e^(z - m),   s = sum (z - m) e^(z - m),   y = z[target],
so that log p = y - m - log l and the entropy is log l - s / l; shards of a vocabulary combine from the same four.
A tile is walked in strips that stay in the processor's cache: every pass after the first is then nearly free.

Letters: N rows of the tile, V its columns, R vocabulary shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.vocab_parallel import VocabShard

NO_COLUMN = -1
"""The local target of a row whose target another shard owns."""
EMPTY_MAX = -1e30
"""m of a shard without columns: finite, so that (m - M) * l is 0 and not NaN."""
_STRIP_ELEMENTS = 1 << 20
_LONG_ROW, _DOT = 8192, 512
_NEVER = -1e4
"""e^-1e4 is 0 in float64 too, and unlike -inf it survives a product with 0."""


class TorchRows:
    """The strips' scratch memory, and what the last strip left in it.

    finite: the caller knows that no logit is -inf, which saves a pass.
    """

    def __init__(self, num_rows: int, num_columns: int, like: Tensor, *, entropy: bool, finite: bool) -> None:
        self.strip = max(1, min(num_rows, _STRIP_ELEMENTS // max(num_columns, 1)))
        self.entropy = entropy
        self.finite = finite
        self.num_columns = num_columns
        padded = -(-num_columns // _DOT) * _DOT if num_columns > _LONG_ROW else num_columns
        self.centred = torch.zeros(self.strip, padded, dtype=like.dtype, device=like.device)
        self.exponentials = torch.zeros_like(self.centred)
        self._held = 0  # rows of the tile whose differences and exponentials are all here

    def statistics(self, tile: Tensor, columns: Tensor) -> Tensor:
        """(N, 4): m, l, s, y of every row; the tile is left alone. columns (N,): local target or NO_COLUMN.

        Without `entropy` s is 0.
        """
        out = tile.new_zeros(tile.shape[0], 4)
        out[:, 3] = tile.gather(1, columns.clamp(min=0)[:, None])[:, 0] if tile.shape[1] else -torch.inf
        out[:, 3].masked_fill_(columns == NO_COLUMN, -torch.inf)
        if tile.shape[1] == 0:
            out[:, 0] = EMPTY_MAX
            return out
        for start in range(0, tile.shape[0], self.strip):
            z, stats = tile[start : start + self.strip], out[start : start + self.strip]
            torch.amax(z, 1, out=stats[:, 0])
            stats[:, 0].clamp_(min=EMPTY_MAX)
            d, e = self._exponentials(z, stats[:, 0])
            torch.sum(e, 1, out=stats[:, 1])
            if self.entropy:
                stats[:, 2] = self._row_dots(d.shape[0])
        self._held = tile.shape[0] if tile.shape[0] <= self.strip else 0
        return out

    def gradient(
        self,
        tile: Tensor,
        columns: Tensor,
        own_max: Tensor,
        log_sum: Tensor,
        entropy: Tensor | None,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
        *,
        reuse: bool = False,
    ) -> Tensor:
        """Overwrite the tile's logits with g (1[target] - p) - h p (log p + H), and return it.

        reuse: the tile still holds what `statistics` saw last. All vectors are (N,).
        own_max is this shard's m; log_sum = log sum e^(z - own_max) over all shards.
        """
        # p = e^(d - log_sum) with d = z - own_max: the row's constants fold into two coefficients.
        scale = torch.exp(-log_sum)
        constant = -grad_logprob
        slope = None
        if grad_entropy is not None and entropy is not None:
            constant = constant - grad_entropy * (entropy - log_sum)
            slope = (-grad_entropy * scale)[:, None]
        constant = (constant * scale)[:, None]
        for start in range(0, tile.shape[0], self.strip):
            rows = slice(start, start + self.strip)
            z = tile[rows]
            if reuse and tile.shape[0] == self._held:
                d, e = self._strips(z.shape[0])
            else:
                d, e = self._exponentials(z, own_max[rows])
            if slope is None:
                torch.mul(e, constant[rows], out=z)
            else:
                torch.addcmul(constant[rows], d, slope[rows], out=d)
                torch.mul(d, e, out=z)
        self._held = 0
        owned = columns != NO_COLUMN
        if tile.shape[1]:
            tile.scatter_add_(1, columns.clamp(min=0)[:, None], torch.where(owned, grad_logprob, 0.0)[:, None])
        return tile

    def _strips(self, num_rows: int) -> tuple[Tensor, Tensor]:
        return self.centred[:num_rows, : self.num_columns], self.exponentials[:num_rows, : self.num_columns]

    def _exponentials(self, z: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor]:
        """d = z - max and e^d of one strip."""
        d, e = self._strips(z.shape[0])
        torch.sub(z, row_max[:, None], out=d)
        if not self.finite:
            d.clamp_(min=_NEVER)
        return d, torch.exp(d, out=e)

    def _row_dots(self, num_rows: int) -> Tensor:
        """sum_j d_ij e^d_ij. Long rows in pieces, as batched products, which would lose digits in one piece."""
        d, e = self.centred[:num_rows], self.exponentials[:num_rows]
        if self.num_columns <= _LONG_ROW:
            return torch.linalg.vecdot(d, e)
        return torch.bmm(d.view(-1, 1, _DOT), e.view(-1, _DOT, 1)).view(num_rows, -1).sum(1)


def combine(gathered: Tensor, inverse_temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(R, N, 4) statistics of all shards, in rank order, to M (N,), log sum e^(z - M) (N,) and (logprob, entropy).

    inverse_temperature: where m and y are of logits that were not divided by the temperature yet.

    Returns: total max (N,), log of the total sum (N,), and (2, N) holding logprobs and entropies.
    """
    row_max, row_sum, row_shifted, target_logit = gathered.unbind(-1)  # (R, N) each
    total_max = row_max.amax(0)
    drop = ((row_max - total_max) * inverse_temperature).clamp(min=EMPTY_MAX)  # finite, for it meets a 0
    factor = torch.exp(drop)
    total = (factor * row_sum).sum(0)
    shifted = (factor * (row_shifted + drop * row_sum)).sum(0)
    log_total = total.log()
    log_p = (target_logit.amax(0) - total_max) * inverse_temperature - log_total
    return total_max, log_total, torch.stack([log_p, log_total - shifted / total])


def log_sum_from(own_max: Tensor, total_max: Tensor, log_total: Tensor) -> Tensor:
    """log sum e^(z - own_max) over all shards (N,), from what `combine` returned; finite, for it meets a 0."""
    return log_total + (total_max - own_max).clamp(max=-EMPTY_MAX)


def local_columns(targets: Tensor, shard: VocabShard) -> Tensor:
    """(T,) the targets' columns in this shard of the vocabulary, NO_COLUMN where another shard owns them."""
    columns = targets - shard.first_column
    return torch.where((columns >= 0) & (columns < shard.num_valid), columns, NO_COLUMN)
