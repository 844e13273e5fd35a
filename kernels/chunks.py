"""Row chunks: how many rows of logits may exist at once, where chunks may begin, and their three GEMMs.

Letters: C rows of a chunk, H hidden, V vocabulary (shard).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.kernels.cpu_linear import linear

Span = tuple[int, int]
"""First token and the one behind the last."""

_CPU_STRIP_ELEMENTS = 1 << 20  # see torch_rows: a chunk of one strip computes its exponentials once
_CPU_TILE_ELEMENTS = 1 << 24
_CPU_GEMM_ROWS = 256  # more rows do not make the CPU's GEMMs faster
_GPU_TILE_FRACTION = 128  # 1.1 GB of an H200, 0.6 GB of an 80 GB card
_ONEDNN_SUM = 1 << 21  # above this, adding oneDNN's product to dWeight costs more than MKL's accumulation loses
_CPU_UPCAST_ROWS = 4096  # rows of a half-precision weight that are float32 at once on a CPU


def tile_dtype(asked: torch.dtype | None, dtype: torch.dtype, triton: bool) -> torch.dtype:
    """The dtype of the tile of logits: float32 (float64 for float64) unless Triton was asked for hidden's own."""
    wide = torch.promote_types(dtype, torch.float32)
    if asked is None or asked == wide:
        return wide
    if not triton or asked != dtype:
        raise ValueError(f"logits_dtype={asked}: use {wide}, or hidden's {dtype} on the Triton backend")
    return asked


def chunk_size(
    asked: int | None, num_columns: int, dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device
) -> int:
    """Rows of a chunk of logits: what was asked for, or from V, the dtypes and the device's total memory.

    Total and not free memory: the chunks fix the order in which dWeight accumulates, and a run must repeat
    bit by bit whatever else happens to be allocated. On a GPU at least 256 rows (60 % of the GEMM's rate by
    the roofline of docs/kernels.md; 1024 reach 94 %), at most 4096.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"chunk_size={asked}: use at least 1, or None")
        return asked
    columns = max(num_columns, 1)
    if device.type == "cuda":
        # dlogits take a second tile where the logits are wider than they are
        bytes_per_logit = logits_dtype.itemsize + (dtype.itemsize if dtype != logits_dtype else 0)
        total = torch.cuda.get_device_properties(device).total_memory
        rows = total // _GPU_TILE_FRACTION // (columns * bytes_per_logit)
        return min(max(rows // 128 * 128, 256), 4096)
    return max(_CPU_STRIP_ELEMENTS // columns, min(_CPU_TILE_ELEMENTS // columns, _CPU_GEMM_ROWS), 16)


def plan_units(num_tokens: int, chunk_size: int, bounds: Sequence[int] | None = None) -> list[list[Span]]:
    """Cut [0, num_tokens) into units, each a list of chunks of at most chunk_size rows.

    What one token's gradient needs lies inside its unit. Without `bounds` a unit is a chunk. With them
    (cu_seqlens as a list) a unit holds whole sequences: as many as fit one chunk, or a single longer one in
    several chunks, whose logits are then computed twice.
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
    """hidden (C, H) @ weight (V, H) transposed, (C, V), in float32 or wider; in the tile where that is free."""
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
    """total (V, H) = scale * dlogits (C, V) transposed @ hidden (C, H), added to what is there unless `first`."""
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
    """float32 on a CPU, where oneDNN takes half of MKL's time off Intel's processors (see cpu_linear.py)."""
    return x.device.type == "cpu" and x.dtype == torch.float32
