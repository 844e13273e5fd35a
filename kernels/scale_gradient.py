"""A gradient that is already there, times the scalar that backward brings: nothing is moved where that is 1.

The loss is usually the end of the graph, and its upstream gradient 1. The host cannot know without waiting for the
device, so a kernel looks: multiplying dlogits regardless would move 4 bytes a bfloat16 logit more than the loss itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.launch import options, unspecialized

_BLOCK = 4096
_PROGRAMS = 2048
"""Few enough that to find a 1 costs microseconds, enough to fill a GPU otherwise."""


@triton.jit(**unspecialized("SCALE", "num_rows"))
def scale_kernel(X, SCALE, num_rows, num_columns, stride, BLOCK: tl.constexpr):
    """X (num_rows, num_columns) *= SCALE, each program every num_programs-th row."""
    scale = tl.load(SCALE).to(tl.float32)
    if scale != 1.0:  # a NaN is not 1 either
        columns = tl.arange(0, BLOCK)
        for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
            x = X + row * stride
            for start in range(0, num_columns, BLOCK):
                inside = start + columns < num_columns
                product = tl.load(x + start + columns, mask=inside).to(tl.float32) * scale
                tl.store(x + start + columns, product.to(X.dtype.element_ty), mask=inside)


def scale_in_place(grad: Tensor | None, scale: Tensor | None, *, backend: str = "auto") -> Tensor | None:
    """grad (n, m) * scale (a scalar) in grad's memory, without waiting for a device; a scale of 1 costs nothing."""
    if grad is None or scale is None:
        return grad
    if not use_triton(backend, grad):
        on_host = scale.device.type == "cpu"
        return grad if on_host and scale.item() == 1.0 else grad.mul_(scale)
    if grad.numel():
        with on_device(grad):
            scale_kernel[(min(grad.shape[0], _PROGRAMS),)](
                grad, scale, *grad.shape, grad.stride(0), BLOCK=_BLOCK, **options(num_warps=8)
            )
    return grad


def scaled_as(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in another dtype, in one pass on a GPU; in grad's memory where the dtype is grad's."""
    if grad.dtype == dtype or grad.device.type != "cuda":
        scaled = scale_in_place(grad, scale)
        assert scaled is not None
        return scaled.to(dtype)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
