"""Row chunks: how many rows of logits may exist at once, where a chunk may begin, and the three GEMMs of a chunk.

Letters: C rows of a chunk, H hidden, V vocabulary (shard).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.kernels.cpu_linear import linear

Span = tuple[int, int]
"""The first token, and the one after the last."""

_CPU_STRIP_ELEMENTS = 1 << 20  # see torch_rows: a chunk of one strip computes its exponentials once
_CPU_TILE_ELEMENTS = 1 << 24
_CPU_GEMM_ROWS = 256  # more rows do not make the CPU's GEMMs faster
GPU_TILE_FRACTION = 124  # 1.2 GB of an H200, 0.7 GB of an 80 GB card
_GPU_STEP = 1 << 32
_ONEDNN_SUM = 1 << 21  # above this, adding oneDNN's product to dWeight costs more than MKL's accumulation loses
_CPU_UPCAST_ROWS = 4096  # rows of a half-precision weight that are float32 at once on a CPU


def tile_dtype(asked: torch.dtype | None, dtype: torch.dtype, triton: bool) -> torch.dtype:
    """The dtype of the tile of logits: float32 (float64 for float64), unless hidden's own was requested on Triton.

    Raises ValueError for any other request.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if asked is None or asked == wide:
        return wide
    if not triton or asked != dtype:
        raise ValueError(f"logits_dtype={asked}: use {wide}, or hidden's {dtype} on the Triton backend")
    return asked


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """Rows that exist at once: `logits` in the wide tile, `gradients` in the dlogits that two GEMMs then consume.

    The two differ if dlogits are narrower than the tile. Logits are then computed in strips, and the two GEMMs, which
    have a cost per chunk (see gpu_chunk_rows), process many strips at once.
    """

    logits: int
    gradients: int


def chunk_rows(
    asked: int | None, weight: Tensor, logits_dtype: torch.dtype, *, gradient: bool, strips: bool = True
) -> ChunkRows:
    """The rows of a chunk: as requested, or chosen from the weight (V, H), the dtypes and the device.

    On a GPU, the choice depends on total rather than free memory: the chunks determine the order in which dWeight
    accumulates, and a run must be reproducible bit by bit whatever else is allocated. Memory counts in steps of 4 GiB,
    because the ranks that share a vocabulary must agree.

    gradient: whether dlogits are needed. strips: whether logits may be computed in strips of a chunk; False if the
    whole chunk must be seen before any gradient.

    Raises ValueError if fewer than 1 row is requested.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"chunk_size={asked}: use at least 1, or None")
        return ChunkRows(logits=asked, gradients=asked)
    columns = max(weight.shape[0], 1)
    if weight.device.type != "cuda":
        size = cpu_chunk_size(columns)
        return ChunkRows(logits=size, gradients=size)
    device = torch.cuda.get_device_properties(weight.device)
    beside = gradient and weight.dtype != logits_dtype
    return gpu_chunk_rows(
        bytes_per_row=(columns * logits_dtype.itemsize, columns * weight.dtype.itemsize if beside else 0),
        hidden_size=weight.shape[1],
        budget=device.total_memory // _GPU_STEP * _GPU_STEP // GPU_TILE_FRACTION,
        num_multiprocessors=device.multi_processor_count,
        strips=strips and beside,
    )


def cpu_chunk_size(num_columns: int) -> int:
    return max(_CPU_STRIP_ELEMENTS // num_columns, min(_CPU_TILE_ELEMENTS // num_columns, _CPU_GEMM_ROWS), 16)


def gpu_chunk_rows(
    *, bytes_per_row: tuple[int, int], hidden_size: int, budget: int, num_multiprocessors: int, strips: bool
) -> ChunkRows:
    """The cheapest chunk of at most 4096 rows within the budget, but of at least 256 rows whatever the budget.

    The cost is counted per row, in units of one of the three GEMMs at its best (docs/kernels.md derives the numbers):
    - dHidden has C / 128 x H / 256 output tiles, and a last wave that fills few multiprocessors leaves the others idle;
    - dWeight is read and written in float32 once per chunk, which takes as long as the products of 650 rows if nothing
      overlaps;
    - the weight is read once per strip, which takes as long as the products of 160 rows, half of it hidden behind them.

    bytes_per_row: of the tile of logits, and of the dlogits beside it.
    """
    best, least = ChunkRows(logits=256, gradients=256), math.inf
    for rows in range(256, 4097, 128):
        for parts in range(1, 17 if strips else 2):
            strip = rows // parts
            if strip < 256 or rows % (128 * parts) or strip * bytes_per_row[0] + rows * bytes_per_row[1] > budget:
                continue
            waves = rows // 128 * -(-hidden_size // 256) / num_multiprocessors
            cost = math.ceil(waves) / waves + 650 / rows + 80 / strip
            if cost < least:
                best, least = ChunkRows(logits=strip, gradients=rows), cost
    return best


def plan_units(num_tokens: int, chunk_size: int, bounds: Sequence[int] | None = None) -> list[list[Span]]:
    """Cut [0, num_tokens) into units, each a list of chunks of at most chunk_size rows.

    Everything that a token's gradient needs lies inside its unit. Without `bounds`, a unit is a single chunk. With
    `bounds` (cu_seqlens as a list), a unit holds whole sequences: as many as fit into one chunk, or a single longer one
    in several chunks, whose logits are then computed twice.

    Raises ValueError if `bounds` do not rise from 0 to num_tokens.
    """
    if bounds is None:
        bounds = [*range(0, num_tokens, chunk_size), num_tokens]
    elif bounds[0] != 0 or bounds[-1] != num_tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"LossInputs.cu_seqlens must rise from 0 to {num_tokens} (the number of tokens)")
    units: list[list[Span]] = []
    start = 0
    for left, right in pairwise(bounds):
        if right - start <= chunk_size:
            continue
        if left > start:
            units.append([(start, left)])
            start = left
        if right - left > chunk_size:
            units.append([(a, min(a + chunk_size, right)) for a in range(left, right, chunk_size)])
            start = right
    if start < num_tokens:
        units.append([(start, num_tokens)])
    return units


def logits(tile: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """(C, V) = hidden (C, H) @ weight (V, H) transposed, in the tile's dtype, and in its memory where that is free."""
    if tile.dtype == hidden.dtype == weight.dtype:
        if _through_onednn(hidden):
            return linear(hidden, weight)
        torch.mm(hidden, weight.T, out=tile)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.T, out_dtype=tile.dtype, out=tile)
    else:
        x = hidden.to(tile.dtype)
        for start in range(0, weight.shape[0], _CPU_UPCAST_ROWS):
            rows = slice(start, start + _CPU_UPCAST_ROWS)
            torch.mm(x, weight[rows].to(tile.dtype).T, out=tile[:, rows])
    return tile


def hidden_gradient_into(out: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """out (C, H) = dlogits (C, V) @ weight (V, H)."""
    if dlogits.dtype == weight.dtype == out.dtype and _through_onednn(dlogits):
        out.copy_(linear(dlogits, weight.T))
        return
    if dlogits.dtype == weight.dtype == out.dtype and (out.device.type == "cuda" or out.dtype.itemsize >= 4):
        torch.mm(dlogits, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for start in range(0, weight.shape[0], _CPU_UPCAST_ROWS):
        rows = slice(start, start + _CPU_UPCAST_ROWS)
        total.addmm_(dlogits[:, rows].float(), weight[rows].float())
    out.copy_(total)


def weight_gradient_into(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool, scale: float = 1.0) -> None:
    """total (V, H) += scale * dlogits (C, V) transposed @ hidden (C, H); with `first`, total is overwritten instead."""
    if dlogits.dtype == hidden.dtype == total.dtype and _through_onednn(hidden) and total.numel() <= _ONEDNN_SUM:
        product = linear(hidden.T, dlogits.T).T
        torch.mul(product, scale, out=total) if first else total.add_(product, alpha=scale)
        return
    factors = {"beta": 0.0 if first else 1.0, "alpha": scale}
    if total.device.type == "cuda" and dlogits.dtype == hidden.dtype != total.dtype:
        torch.addmm(total, dlogits.T, hidden, out_dtype=total.dtype, out=total, **factors)
    else:
        torch.addmm(total, dlogits.T.to(total.dtype), hidden.to(total.dtype), out=total, **factors)


def _through_onednn(x: Tensor) -> bool:
    """float32 on a CPU, where oneDNN takes half of MKL's time on processors not made by Intel (see cpu_linear.py)."""
    return x.device.type == "cpu" and x.dtype == torch.float32
