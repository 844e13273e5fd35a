"""RMSNorm, alone or fused with the preceding residual sum, in one pass over memory in each direction.

    out = x r * weight,  r = 1 / sqrt(mean(x^2) + epsilon)                          (arXiv 1910.07467, eq. 4)
    grad_x = r (u - x r * mean(u x r)),  u = grad * weight;      grad_weight = sum over rows of grad * x r

Values are rounded where Hugging Face's modules round: the sum, then x r, then the product with the weight. Bytes per
element in bfloat16: 4 forward and 6 backward; with the residual sum, 8 and 8. Only x is saved for the backward pass.
There are no second derivatives.

Letters: n rows, D the size of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.launch import options, unspecialized

_PROGRAMS = 512
"""Of the backward pass, each with a float32 row of grad_weight: four on each of an H200's multiprocessors."""


@triton.jit(**unspecialized("num_rows"))
def norm_kernel(
    X,
    CHANGE,
    WEIGHT,
    SUM,
    OUT,
    num_rows,
    size,
    epsilon,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows: OUT = rms_norm(X), or where ADDS, SUM = X + CHANGE and OUT = rms_norm(SUM)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    at = row[:, None] * size + column[None, :]
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(CHANGE + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / size + epsilon)
    weight = tl.load(WEIGHT + column, mask=column < size, other=0.0).to(tl.float32)
    normed = (x * inverse_rms[:, None]).to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + at, (normed * weight[None, :]).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(**unspecialized("num_rows"))
def norm_backward_kernel(
    GRAD,
    X,
    WEIGHT,
    GRAD_SUM,
    GRAD_X,
    GRAD_WEIGHT,
    num_rows,
    size,
    epsilon,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every num_programs-th ROWS rows of GRAD_X, and their share of the weight's gradient as a row of GRAD_WEIGHT.

    ADDS: GRAD_SUM, the gradient that reaches the sum past the norm, is added.
    """
    column = tl.arange(0, COLUMNS)
    weight = tl.load(WEIGHT + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / size + epsilon)[:, None]
        normed = x * inverse_rms
        grad_weight += grad * normed
        grad *= weight
        grad_x = (grad - normed * (tl.sum(grad * normed, 1) / size)[:, None]) * inverse_rms
        if ADDS:
            grad_x += tl.load(GRAD_SUM + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(GRAD_X + at, grad_x.to(GRAD_X.dtype.element_ty), mask=inside)
    at_weight = GRAD_WEIGHT + tl.program_id(0).to(tl.int64) * size + column
    tl.store(at_weight, tl.sum(grad_weight, 0), mask=column < size)


def _shape(size: int) -> dict[str, Any]:
    """ROWS, COLUMNS and options for rows of that size: 16 elements a thread, up to 8192 of them."""
    columns = triton.next_power_of_2(size)
    rows = max(1, 2048 // columns)
    return {"ROWS": rows, "COLUMNS": columns, **options(num_warps=min(16, rows * columns // 512))}


def _forward(x: Tensor, change: Tensor | None, weight: Tensor, epsilon: float, backend: str) -> tuple[Tensor, ...]:
    """x, or x + change; its norm; and 1 / rms where the gradient takes it from here: (n, 1), float32 at least."""
    if not use_triton(backend, x):
        total = x if change is None else x + change
        wide = total if total.dtype == torch.float64 else total.float()
        mean_square = torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
        inverse_rms = mean_square.add_(epsilon).rsqrt_()
        return total, (wide * inverse_rms).to(x.dtype).mul_(weight), inverse_rms
    x = x.contiguous()
    total = x if change is None else torch.empty_like(x)
    out, num_rows, shape = torch.empty_like(x), x.numel() // x.shape[-1], _shape(x.shape[-1])
    if num_rows:
        with on_device(x):
            norm_kernel[(triton.cdiv(num_rows, shape["ROWS"]),)](
                x,
                x if change is None else change.contiguous(),
                weight,
                total,
                out,
                num_rows,
                x.shape[-1],
                epsilon,
                ADDS=change is not None,
                **shape,
            )
    return total, out


def _backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, epsilon: float, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients for x and the weight. kept: 1 / rms from the forward pass, or nothing where that ran in Triton."""
    if kept:
        (inverse_rms,) = kept
        wide, x = grad.to(inverse_rms.dtype), x.to(inverse_rms.dtype)
        product = wide * x
        grad_weight = torch.mul(product, inverse_rms).sum(tuple(range(x.ndim - 1)))
        along_x = torch.linalg.vecdot(product, weight.to(product.dtype))[..., None]
        grad_x = torch.mul(wide, weight, out=product).mul_(inverse_rms)
        grad_x.addcmul_(x, along_x.mul_(inverse_rms.pow(3)), value=-1 / x.shape[-1])
        if grad_sum is not None:
            grad_x.add_(grad_sum)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype)
    grad_x, num_rows, size, shape = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1], _shape(x.shape[-1])
    if not num_rows:
        return grad_x, torch.zeros_like(weight)
    programs = min(_PROGRAMS, triton.cdiv(num_rows, shape["ROWS"]))
    parts = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    grad = grad.contiguous()
    with on_device(x):
        norm_backward_kernel[(programs,)](
            grad,
            x,
            weight,
            grad if grad_sum is None else grad_sum.contiguous(),
            grad_x,
            parts,
            num_rows,
            size,
            epsilon,
            ADDS=grad_sum is not None,
            **shape,
        )
    return grad_x, parts.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float, backend: str) -> Tensor:
        x, out, *kept = _forward(x, None, weight, epsilon, backend)
        ctx.save_for_backward(x, weight, *kept)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, *kept = ctx.saved_tensors
        return *_backward(grad, None, x, weight, ctx.epsilon, tuple(kept)), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stream: Tensor, change: Tensor, weight: Tensor, epsilon: float, backend: str):
        stream, out, *kept = _forward(stream, change, weight, epsilon, backend)
        ctx.save_for_backward(stream, weight, *kept)
        ctx.epsilon = epsilon
        ctx.set_materialize_grads(False)
        return stream, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stream: Tensor | None, grad: Tensor):
        stream, weight, *kept = ctx.saved_tensors
        grad_x, grad_weight = _backward(grad, grad_stream, stream, weight, ctx.epsilon, tuple(kept))
        return grad_x, grad_x, grad_weight, None, None


def _check(x: Tensor, weight: Tensor, change: Tensor | None = None) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {tuple(weight.shape)} of {weight.dtype} must be {(x.shape[-1],)} of {x.dtype}")
    if change is not None and (change.shape != x.shape or change.dtype != x.dtype):
        raise ValueError(f"stream {tuple(x.shape)} and change {tuple(change.shape)} must be alike, in dtype too")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

    x: (..., D); weight: (D,), of x's dtype. Returns a tensor of x's shape and dtype.
    backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".
    Raises ValueError if shapes or dtypes do not match.
    """
    _check(x, weight)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, epsilon, backend)
    return _forward(x, None, weight, epsilon, backend)[1]


def add_norm(
    stream: Tensor, change: Tensor, weight: Tensor, epsilon: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual sum stream + change, and the rms_norm of that sum.

    stream, change: (..., D), of the same dtype; weight: (D,). Returns (sum, norm), both of stream's shape and dtype.
    backend and errors: as for rms_norm.
    """
    _check(stream, weight, change)
    if torch.is_grad_enabled():
        return _AddNorm.apply(stream, change, weight, epsilon, backend)
    total, out, *_ = _forward(stream, change, weight, epsilon, backend)
    return total, out
