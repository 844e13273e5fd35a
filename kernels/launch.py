"""Launch shapes of the row kernels, and the reason no argument's value forces a recompilation.

A row is walked in steps of four blocks; a block is one 16-byte load per thread. docs/kernels.md has the table of
registers these shapes compile to.
"""

from __future__ import annotations

from typing import Any

import torch

_VECTOR_BYTES = 16
_WARP = 32
MAX_WARPS = 8
"""More put fewer rows in flight, so that more of a row's second read hits the L2 cache, and more registers at stake."""


def row_shape(num_columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """BLOCK and num_warps for rows of that many columns, read in that dtype. It depends on V and dtype alone."""
    per_warp = _WARP * _VECTOR_BYTES // dtype.itemsize
    warps = 1
    while warps < MAX_WARPS and 4 * per_warp * warps * 2 <= num_columns:
        warps *= 2
    return {"BLOCK": per_warp * warps, "num_warps": warps}


def unspecialized(*names: str) -> dict[str, Any]:
    """triton.jit options: these integers and pointers never select a variant by value or alignment.

    Row counts, offsets and per-row vectors change from call to call and are read one scalar at a time, so a
    variant for "divisible by 16" or "equal to 1" would cost a compilation and gain nothing.
    """
    return {"do_not_specialize": list(names), "do_not_specialize_on_alignment": list(names)}
