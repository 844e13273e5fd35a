"""SwiGLU, silu(gate) * up, in one pass over memory in each direction.

arXiv 2002.05202, with silu(x) = x sigmoid(x):

    grad_up = grad * silu(gate);   grad_gate = grad * up * s (1 + gate (1 - s)),  s = sigmoid(gate)

Values are rounded where Hugging Face's modules round: silu(gate), then the product. Bytes per element of the result in
bfloat16: 6 forward and 10 backward. Only gate and up are saved for the backward pass. There are no second derivatives.

Letters: n rows, I the size of a row of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.launch import options, unspecialized

_BLOCK = 2048
"""Columns of one program: 16 for each of 128 threads."""


@triton.jit(**unspecialized("num_blocks"))
def swiglu_kernel(GATE, UP, OUT, num_blocks, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    """BLOCK columns of a row: OUT = silu(GATE) * UP."""
    program = tl.program_id(0).to(tl.int64)
    row, column = program // num_blocks, program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(GATE + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * size + column, (silu * up).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(**unspecialized("num_blocks"))
def swiglu_backward_kernel(
    GRAD, GATE, UP, GRAD_GATE, GRAD_UP, num_blocks, size, gate_stride, up_stride, grad_stride, BLOCK: tl.constexpr
):
    """BLOCK columns of a row of both gradients, whose rows are grad_stride apart."""
    program = tl.program_id(0).to(tl.int64)
    row, column = program // num_blocks, program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    grad = tl.load(GRAD + row * size + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    at = row * grad_stride + column
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(GRAD_GATE + at, grad_gate.to(GRAD_GATE.dtype.element_ty), mask=inside)
    tl.store(GRAD_UP + at, (grad * gate * sigmoid).to(GRAD_UP.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """(..., I) -> (n, I), a view where the rows are evenly apart."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    if not use_triton(backend, gate):
        return F.silu(gate).mul_(up)
    out, size = gate.new_empty(gate.shape), gate.shape[-1]
    num_blocks = triton.cdiv(size, _BLOCK)
    if out.numel():
        gate, up = _rows(gate), _rows(up)
        with on_device(out):
            swiglu_kernel[(len(gate) * num_blocks,)](
                gate, up, out, num_blocks, size, gate.stride(0), up.stride(0), BLOCK=_BLOCK, **options(num_warps=4)
            )
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, backend: str) -> None:
    """Fill grad_gate and grad_up, whose rows are equally far apart."""
    if not use_triton(backend, gate):  # silu(gate) is computed again: cheaper than to keep and to read
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        return
    size = gate.shape[-1]
    num_blocks = triton.cdiv(size, _BLOCK)
    if grad.numel():
        gate, up, grad_gate, grad_up, grad = *map(_rows, (gate, up, grad_gate, grad_up)), grad.contiguous()
        with on_device(grad):
            swiglu_backward_kernel[(len(gate) * num_blocks,)](
                grad,
                gate,
                up,
                grad_gate,
                grad_up,
                num_blocks,
                size,
                gate.stride(0),
                up.stride(0),
                grad_gate.stride(0),
                BLOCK=_BLOCK,
                **options(num_warps=4),
            )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _forward(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grads = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        _backward(grad, gate, up, *grads, ctx.backend)
        return *grads, None


class _JointSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.backend = backend
        gate, up = gate_up.chunk(2, -1)
        return _forward(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grads = gate_up.new_empty(gate_up.shape)
        grad_gate, grad_up = grads.chunk(2, -1)
        _backward(grad, gate, up, grad_gate, grad_up, ctx.backend)
        return grads, None


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, of shape (..., I).

    gate, up: (..., I) each. Without up, gate is (..., 2I) and holds both side by side, gate first.
    backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".
    Raises ValueError if the shapes do not match.
    """
    if gate.shape[-1] % 2 if up is None else gate.shape != up.shape:
        what = "both side by side must be even" if up is None else f"and up {tuple(up.shape)} must be alike"
        raise ValueError(f"gate {tuple(gate.shape)} {what}")
    if torch.is_grad_enabled():
        return _JointSwiGLU.apply(gate, backend) if up is None else _SwiGLU.apply(gate, up, backend)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return _forward(gate, up, backend)
