"""The parts of a decoder layer between its products: fewer passes over memory, and gradients written out.

Every function computes what Hugging Face's modules do, rounding where they round. Under autograd each is one node
that keeps only what its gradient needs; without gradients it is the bare computation. They can be differentiated once.

Letters: T rows, H hidden, I intermediate, A heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.models.storage import fused

# --- parameters side by side -----------------------------------------------------------------------------------------


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, *grad.split(ctx.sizes)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts one under the other; nothing is copied where they lie so in memory (storage.lay_out)."""
    if len(parts) == 1:
        return parts[0]
    whole = fused(parts)
    return torch.cat(tuple(parts)) if whole is None else _Join.apply(whole, *parts)


# --- the residual stream and RMSNorm ---------------------------------------------------------------------------------


def _normalized(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight, 1 / rms(x) in float32 at least)."""
    wide = x if x.dtype == torch.float64 else x.float()
    mean_square = torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
    inverse_rms = mean_square.add_(epsilon).rsqrt_()
    return (wide * inverse_rms).to(x.dtype).mul_(weight), inverse_rms


def _norm_backward(grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_normalized`'s output for x, in inverse_rms's dtype, and for weight."""
    grad, x = grad.to(inverse_rms.dtype), x.to(inverse_rms.dtype)
    product = grad * x
    grad_weight = torch.mul(product, inverse_rms).sum(tuple(range(x.ndim - weight.ndim)))
    along_x = torch.linalg.vecdot(product, weight.to(product.dtype))[..., None]
    grad_x = torch.mul(grad, weight, out=product).mul_(inverse_rms)
    return grad_x.addcmul_(x, along_x.mul_(inverse_rms.pow(3)), value=-1 / x.shape[-1]), grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, inverse_rms = _normalized(x, weight, epsilon)
        ctx.save_for_backward(x, inverse_rms, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, inverse_rms, weight = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(grad, x, inverse_rms, weight)
        return grad_x.to(x.dtype), grad_weight, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stream: Tensor, change: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        stream = stream + change
        out, inverse_rms = _normalized(stream, weight, epsilon)
        ctx.save_for_backward(stream, inverse_rms, weight)
        ctx.set_materialize_grads(False)
        return stream, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stream: Tensor | None, grad: Tensor):
        stream, inverse_rms, weight = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(grad, stream, inverse_rms, weight)
        if grad_stream is not None:
            grad_x.add_(grad_stream)
        grad_x = grad_x.to(stream.dtype)
        return grad_x, grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis: x (T, ..., D), weight (..., D) -> like x."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, epsilon)
    return _normalized(x, weight, epsilon)[0]


def add_norm(stream: Tensor, change: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """stream + change, and its rms_norm: (T, H), (T, H), (H,) -> (T, H) twice."""
    if torch.is_grad_enabled():
        return _AddNorm.apply(stream, change, weight, epsilon)
    stream = stream + change
    return stream, _normalized(stream, weight, epsilon)[0]


# --- rotary positions ------------------------------------------------------------------------------------------------


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, direction: int) -> Tensor:
    half = qkv.shape[-1] // 2
    out = torch.empty_like(qkv)
    out[:, num_heads:] = qkv[:, num_heads:]
    x, turned = qkv[:, :num_heads], out[:, :num_heads]
    torch.mul(x, cos, out=turned)
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.num_heads = num_heads
        return _rotated(qkv, cos, sin, num_heads, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, ctx.num_heads, -1), None, None, None


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the pairs (i, i + D/2) of the first num_heads heads, the queries' and keys'.

    qkv: (T, A, D) -> the same, in new memory; cos and sin: (T, 1, D), their halves equal.
    """
    if torch.is_grad_enabled():
        return _Rotary.apply(qkv, cos, sin, num_heads)
    return _rotated(qkv, cos, sin, num_heads, 1)


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors  # silu(gate) is computed again: cheaper than to keep and to read
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: (T, I) twice -> (T, I)."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
