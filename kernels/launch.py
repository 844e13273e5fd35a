"""Launch shapes of the row kernels, and the reason no argument's value forces a recompilation.

A row is walked in steps of four blocks; a block is one 16-byte load per thread. docs/kernels.md has the table of
registers these shapes compile to.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_VECTOR_BYTES = 16
_WARP = 32
MAX_WARPS = 8
"""More put fewer rows in flight, so that more of a row's second read hits the L2 cache, and more registers at stake."""


def row_shape(rows: Tensor) -> dict[str, Any]:
    """BLOCK, VECTOR and options for the rows (n, V) of a tile, from V, dtype and alignment alone.

    VECTOR: columns that a thread loads at once; 1 where Triton cannot tell that every row starts at 16 bytes.
    """
    vector = _VECTOR_BYTES // rows.dtype.itemsize
    aligned = rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0
    per_warp = _WARP * vector
    warps = 1
    while warps < MAX_WARPS and 4 * per_warp * warps * 2 <= rows.shape[1]:
        warps *= 2
    return {"BLOCK": per_warp * warps, "VECTOR": vector if aligned else 1, **options(num_warps=warps)}


def options(num_warps: int) -> dict[str, Any]:
    """What every launch asks of the compiler: a * b + c in one instruction, which is rounded once. Triton does so by
    default up to 3.9, which warns where it is not said; 3.10 is announced not to."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def unspecialized(*names: str) -> dict[str, Any]:
    """triton.jit options: these integers and pointers never select a variant by value or alignment.

    Row counts, offsets and per-row vectors change from call to call and are read one scalar at a time, so a
    variant for "divisible by 16" or "equal to 1" would cost a compilation and gain nothing.
    """
    return {"do_not_specialize": list(names), "do_not_specialize_on_alignment": list(names)}
