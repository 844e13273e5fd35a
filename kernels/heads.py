"""Where tiles of logits come from and where their gradients go, chunk by chunk.

LinearHead computes them from hidden states; GivenLogits copies them out of logits that somebody else made.
Letters: T tokens, n rows of a chunk, H hidden, V vocabulary (shard).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.kernels import chunks
from fastgrpo.kernels.chunks import ChunkRows, Span
from fastgrpo.kernels.vocab_parallel import VocabShard


class Head:
    """The rows that matter. scored (T,) bool: the other rows may hold NaN and receive zero gradient.

    The torch backend leaves the others out, which looks at `scored` on the host; the Triton backend keeps
    every row in place (num_rows == T), because its kernels write zeros for them.
    """

    tile: Tensor
    """(chunk_size, V), reused for every chunk."""
    chunk_size: int

    def __init__(self, scored: Tensor, *, triton: bool) -> None:
        self.scored, self.triton = scored, triton
        self.kept: Tensor | None = None if triton or bool(scored.all()) else scored.nonzero()[:, 0]
        self.num_rows = scored.shape[0] if self.kept is None else self.kept.shape[0]

    def logits(self, span: Span) -> Tensor:
        """(n, V) in the tile. For the torch backend they are divided by the temperature; Triton's rows divide."""
        raise NotImplementedError

    def accumulate(self, dlogits: Tensor, span: Span) -> None:
        """Take in a chunk's gradient (n, V) with respect to the undivided logits."""
        raise NotImplementedError

    def gradient_tile(self, tile: Tensor, span: Span) -> Tensor:
        """Where Triton writes the gradient of a tile: in place unless the head says otherwise."""
        return tile

    def spans(self) -> list[Span]:
        """All rows in chunks."""
        return [span for unit in chunks.plan_units(self.num_rows, self.chunk_size) for span in unit]

    def keep(self, per_token: Tensor) -> Tensor:
        """The entries (T,) of the rows this head works on."""
        return per_token if self.kept is None else per_token[self.kept]

    def spread(self, per_row: Tensor) -> Tensor:
        """Back to all T tokens, with zeros where a row was left out."""
        if self.kept is None:
            return per_row
        out = per_row.new_zeros(self.scored.shape[0], *per_row.shape[1:])
        return out.index_copy_(0, self.kept, per_row)

    def pick(self, rows: Tensor, span: Span) -> Tensor:
        """The rows (n, ...) of a (T, ...) tensor that a span of this head stands for."""
        return rows[slice(*span)] if self.kept is None else rows[self.kept[slice(*span)]]


class LinearHead(Head):
    """Logits of hidden (T, H) @ weight (V, H) transposed; gradients accumulate in dHidden and dWeight."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        scored: Tensor,
        shard: VocabShard,
        *,
        triton: bool,
        rows: ChunkRows,
        tile_dtype: torch.dtype,
        temperature: float,
    ) -> None:
        super().__init__(scored, triton=triton)
        self.hidden, self.shard, self.temperature, self.rows = hidden, shard, temperature, rows
        self.chunk_size = rows.logits
        # Triton: the whole shard, whose padding the kernels mask, so that the GEMM's shape stays aligned.
        self.weight = weight if triton else weight[: shard.num_valid]
        self.full_shape = weight.shape
        num_columns = self.weight.shape[0]
        self.tile = self._tile(rows.logits, num_columns, tile_dtype)
        self._narrow: Tensor | None = None
        self._due: Span | None = None
        """The rows whose dlogits wait in _narrow for their GEMMs."""
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self._pending: list[dist.Work] = []

    def _tile(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
        # Triton knows a stride for aligned, and loads vectors, where 16 divides it
        stride = -(-max(num_columns, 1) // 16) * 16
        return self.hidden.new_empty(min(num_rows, self.num_rows), stride, dtype=dtype)[:, :num_columns]

    def want_gradients(
        self,
        *,
        hidden: bool,
        weight: bool,
        buffer: Tensor | None = None,
        buffer_scale: float = 1.0,
        reduce_hidden: bool = True,
    ) -> None:
        """Prepare the accumulators; with a buffer, dWeight * buffer_scale is added to what it holds."""
        self._buffer_given, self._scale, self._reduce = buffer is not None, buffer_scale, reduce_hidden
        if hidden:
            self.grad_hidden = self.hidden.new_empty(self.num_rows, self.hidden.shape[1])
        if weight:
            wide = torch.promote_types(self.hidden.dtype, torch.float32)
            self.grad_weight = self.hidden.new_empty(self.full_shape, dtype=wide) if buffer is None else buffer
        self._fresh = buffer is None
        if self.triton and self.tile.dtype != self.hidden.dtype and (hidden or weight):
            self._narrow = self._tile(self.rows.gradients, self.weight.shape[0], self.hidden.dtype)

    def logits(self, span: Span) -> Tensor:
        tile, x = self.tile[: span[1] - span[0]], self._chunk(span)
        if self.temperature != 1.0 and not self.triton:  # (n, H) is narrower than (n, V)
            x = x.to(tile.dtype) / self.temperature
        return chunks.logits(tile, x, self.weight)

    def gradient_tile(self, tile: Tensor, span: Span) -> Tensor:
        """The GEMMs of the backward pass want dlogits in hidden's dtype, and those of many tiles at once."""
        if self._narrow is None:
            return tile
        if self._due is not None and span[1] - self._due[0] > self._narrow.shape[0]:
            self._multiply_due()
        first = span[0] if self._due is None else self._due[0]
        self._due = (first, span[1])
        return self._narrow[span[0] - first : span[1] - first]

    def accumulate(self, dlogits: Tensor, span: Span) -> None:
        if self._narrow is None:
            self._multiply(dlogits, span)

    def _multiply_due(self) -> None:
        if self._narrow is not None and self._due is not None:
            self._multiply(self._narrow[: self._due[1] - self._due[0]], self._due)
            self._due = None

    def _multiply(self, dlogits: Tensor, span: Span) -> None:
        """The two GEMMs behind a chunk's dlogits."""
        if self.grad_hidden is not None:
            out = self.grad_hidden[slice(*span)]
            chunks.hidden_gradient_into(out, dlogits, self.weight)
            if self._reduce:  # travels while the next GEMM computes
                self._pending += self.shard.start_sum(out)
        if self.grad_weight is not None:
            total = self.grad_weight[: self.weight.shape[0]]
            chunks.weight_gradient_into(total, dlogits, self._chunk(span), first=self._fresh, scale=self._scale)
            self._fresh = False

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dHidden (T, H), dWeight (V, H) in the accumulator's dtype, or None where it went to the buffer)."""
        self._multiply_due()
        for work in self._pending:
            work.wait()
        grad_hidden = None if self.grad_hidden is None else self.spread(self.grad_hidden)
        if self.grad_weight is None or self._buffer_given:
            return grad_hidden, None
        unwritten = 0 if self._fresh else self.weight.shape[0]
        self.grad_weight[unwritten:].zero_()
        return grad_hidden, self.grad_weight

    def _chunk(self, span: Span) -> Tensor:
        """The chunk's hidden states (n, H), without NaN: 0 * NaN would carry it into dWeight."""
        x = self.pick(self.hidden, span)
        return torch.where(self.scored[slice(*span), None], x, 0.0) if self.triton else x


class GivenLogits(Head):
    """Rows of given logits (T, V), copied into a wide tile: the torch path of the ops that start from logits."""

    def __init__(self, logits: Tensor, scored: Tensor, *, temperature: float) -> None:
        super().__init__(scored, triton=False)
        self.source, self.temperature = logits, temperature
        dtype = chunks.tile_dtype(None, logits.dtype, triton=False)
        num_columns = logits.shape[1]
        size = chunks.cpu_chunk_size(max(num_columns, 1))
        self.tile = logits.new_empty(min(size, self.num_rows), num_columns, dtype=dtype)
        self.chunk_size = size
        self.grad_logits: Tensor | None = None

    def want_gradient(self, *, in_place: bool) -> None:
        """Prepare (T, V) for the gradient, or let it overwrite the logits."""
        if in_place:
            self.grad_logits = self.source
            self.source[~self.scored] = 0.0
        else:
            self.grad_logits = torch.empty_like(self.source) if self.kept is None else torch.zeros_like(self.source)

    def logits(self, span: Span) -> Tensor:
        tile = self.tile[: span[1] - span[0]]
        tile.copy_(self.pick(self.source, span))
        return tile if self.temperature == 1.0 else tile.div_(self.temperature)

    def accumulate(self, dlogits: Tensor, span: Span) -> None:
        assert self.grad_logits is not None
        rows = slice(*span) if self.kept is None else self.kept[slice(*span)]
        self.grad_logits[rows] = dlogits.to(self.grad_logits.dtype)


class LogitsInPlace(Head):
    """Given logits (T, V) as a single tile: the Triton path of the ops that start from logits."""

    def __init__(self, logits: Tensor) -> None:
        self.triton, self.kept, self.num_rows = True, None, logits.shape[0]
        self.tile, self.chunk_size = logits, max(logits.shape[0], 1)
        self.grad_logits: Tensor | None = None

    def want_gradient(self, *, in_place: bool) -> None:
        """Prepare (T, V) for the gradient, or let it overwrite the logits."""
        self.grad_logits = self.tile if in_place else torch.empty_like(self.tile)

    def gradient_tile(self, tile: Tensor, span: Span) -> Tensor:
        assert self.grad_logits is not None
        return self.grad_logits

    def logits(self, span: Span) -> Tensor:
        return self.tile

    def accumulate(self, dlogits: Tensor, span: Span) -> None:
        pass  # the kernel wrote it where it belongs
