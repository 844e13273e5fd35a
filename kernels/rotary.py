"""Rotary embedding of the queries and keys in a fused QKV product, with their norms where the model has them.

One pass over memory in each direction. A head consists of two halves, x = (x1, x2), and is rotated by its row's angles
(arXiv 2104.09864, with the halves in Hugging Face's order):

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin           grad: x1 = g1 cos + g2 sin,  x2 = g2 cos - g1 sin

In models that normalise queries and keys, x = rms_norm(x) over the head comes first (rms_norm.py). Bytes per element of
queries and keys in bfloat16: 4 forward and 6 backward (4 if nothing is normalised). The gradients of queries, keys and
values are written into one tensor, the gradient of the product, so nothing has to be concatenated afterwards.

Letters: T rows, A query heads, C key/value heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.launch import options, unspecialized

_ELEMENTS = 2048
"""Of one program's tile: 16 for each of 128 threads."""
_PROGRAMS = 512
"""Of the backward pass, where each sums a share of the weights' gradient."""


@triton.jit
def _halves(X, at, inside, half):
    """Both halves of the heads that begin at `at`, in float32."""
    first = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(X + at + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(X, at, inside, half, first, second):
    tl.store(X + at, first.to(X.dtype.element_ty), mask=inside)
    tl.store(X + at + half, second.to(X.dtype.element_ty), mask=inside)


@triton.jit(**unspecialized("num_queries", "num_heads"))
def rotary_kernel(
    QKV,
    COS,
    SIN,
    WEIGHT,
    Q,
    K,
    num_queries,
    num_heads,
    half,
    row_stride,
    angle_stride,
    epsilon,
    IS_NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """HEADS of a row's num_heads = A + C heads; the first num_queries = A of them go to Q, the others to K."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (d < half)
    x1, x2 = _halves(QKV, row * row_stride + head * 2 * half + d, inside, half)
    if IS_NORMED:
        w1, w2 = _halves(WEIGHT, head * 2 * half + d, inside, half)
        inverse_rms = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * half) + epsilon)[:, None]
        x1 = (x1 * inverse_rms).to(Q.dtype.element_ty).to(tl.float32) * w1
        x2 = (x2 * inverse_rms).to(Q.dtype.element_ty).to(tl.float32) * w2
        x1, x2 = x1.to(Q.dtype.element_ty).to(tl.float32), x2.to(Q.dtype.element_ty).to(tl.float32)
    cos = tl.load(COS + row * angle_stride + d, mask=d < half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + row * angle_stride + d, mask=d < half, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    is_query = head < num_queries
    at_q = (row * num_queries + head) * 2 * half + d
    at_k = (row * (num_heads - num_queries) + head - num_queries) * 2 * half + d
    _store_halves(Q, at_q, inside & is_query, half, y1, y2)
    _store_halves(K, at_k, inside & (head >= num_queries), half, y1, y2)


@triton.jit(**unspecialized("num_rows", "num_queries", "num_heads"))
def rotary_backward_kernel(
    GRAD_Q,
    GRAD_K,
    QKV,
    COS,
    SIN,
    WEIGHT,
    GRAD_QKV,
    GRAD_WEIGHT,
    num_rows,
    num_queries,
    num_heads,
    half,
    row_stride,
    grad_row_stride,
    angle_stride,
    epsilon,
    IS_NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """HEADS heads of every num_programs-th row of GRAD_QKV, and their share of the weights' gradient."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (d < half)
    of_queries, of_keys = inside & (head < num_queries), inside & (head >= num_queries)
    if IS_NORMED:
        w1, w2 = _halves(WEIGHT, head * 2 * half + d, inside, half)
        sum1, sum2 = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        at_q = (row * num_queries + head) * 2 * half + d
        at_k = (row * (num_heads - num_queries) + head - num_queries) * 2 * half + d
        q1, q2 = _halves(GRAD_Q, at_q, of_queries, half)
        k1, k2 = _halves(GRAD_K, at_k, of_keys, half)
        g1, g2 = q1 + k1, q2 + k2  # one of each is 0
        cos = tl.load(COS + row * angle_stride + d, mask=d < half, other=0.0).to(tl.float32)
        sin = tl.load(SIN + row * angle_stride + d, mask=d < half, other=0.0).to(tl.float32)
        x_grad1, x_grad2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        if IS_NORMED:
            x1, x2 = _halves(QKV, row * row_stride + head * 2 * half + d, inside, half)
            inverse_rms = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * half) + epsilon)[:, None]
            x1, x2 = x1 * inverse_rms, x2 * inverse_rms
            sum1 += x_grad1 * x1
            sum2 += x_grad2 * x2
            x_grad1, x_grad2 = x_grad1 * w1, x_grad2 * w2
            along = ((tl.sum(x_grad1 * x1, 1) + tl.sum(x_grad2 * x2, 1)) / (2 * half))[:, None]
            x_grad1, x_grad2 = (x_grad1 - x1 * along) * inverse_rms, (x_grad2 - x2 * along) * inverse_rms
        _store_halves(GRAD_QKV, row * grad_row_stride + head * 2 * half + d, inside, half, x_grad1, x_grad2)
    if IS_NORMED:
        at = (tl.program_id(0).to(tl.int64) * num_heads + head) * 2 * half + d
        _store_halves(GRAD_WEIGHT, at, inside, half, sum1, sum2)


def _tile(num_heads: int, size: int) -> dict[str, int]:
    columns = triton.next_power_of_2(size // 2)
    return {"HEADS": min(triton.next_power_of_2(num_heads), max(1, _ELEMENTS // (2 * columns))), "HALF": columns}


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """rms_norm of (T, A + C, D) over D in torch, and 1 / rms (T, A + C, 1), float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    inverse_rms = (torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]).add_(epsilon).rsqrt_()
    return (wide * inverse_rms).to(x.dtype).mul_(weight), inverse_rms


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float, sizes: list[int], backend: str
) -> tuple[Tensor, ...]:
    """q, k, and 1 / rms where something is normalised in torch."""
    (num_rows, _, size), num_heads = qkv.shape, sizes[0] + sizes[1]
    if not use_triton(backend, qkv):
        x = qkv[:, :num_heads]
        kept: list[Tensor] = []
        if weight is not None:
            x, *kept = _normed(x, weight, epsilon)
        q, k = (qkv.new_empty(num_rows, heads, size) for heads in sizes[:2])
        for part, out in zip(x.split(sizes[:2], 1), (q, k), strict=True):
            _turn(part, cos, sin, 1, out)
        return q, k, *kept
    q, k = (qkv.new_empty(num_rows, heads, size) for heads in sizes[:2])
    tile = _tile(num_heads, size)
    if num_rows:
        with on_device(qkv):
            rotary_kernel[(num_rows, triton.cdiv(num_heads, tile["HEADS"]))](
                qkv,
                cos,
                sin,
                qkv if weight is None else weight,
                q,
                k,
                sizes[0],
                num_heads,
                size // 2,
                qkv.stride(0),
                cos.stride(0),
                epsilon,
                IS_NORMED=weight is not None,
                **tile,
                **options(num_warps=4),
            )
    return q, k


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    normed: tuple[Tensor, ...],
    epsilon: float,
    backend: str,
) -> Tensor | None:
    """Fill the queries' and keys' part of grad_qkv; returns the weights' gradient where there are any.

    normed: qkv, the weights and in torch 1 / rms, where something was normalised.
    """
    num_rows, sizes, size = grad_q.shape[0], [grad_q.shape[1], grad_k.shape[1]], grad_q.shape[-1]
    num_heads = sum(sizes)
    if not use_triton(backend, grad_q):
        grad_x = grad_qkv[:, :num_heads]
        for grad, out in zip((grad_q, grad_k), grad_x.split(sizes, 1), strict=True):
            _turn(grad, cos, sin, -1, out)
        if not normed:
            return None
        qkv, weight, inverse_rms = normed
        grad, x = grad_x.to(inverse_rms.dtype), qkv[:, :num_heads].to(inverse_rms.dtype)
        product = grad * x
        grad_weight = torch.mul(product, inverse_rms).sum(0)
        along_x = torch.linalg.vecdot(product, weight.to(product.dtype))[..., None]
        torch.mul(grad, weight, out=product).mul_(inverse_rms)
        grad_x.copy_(product.addcmul_(x, along_x.mul_(inverse_rms.pow(3)), value=-1 / size))
        return grad_weight.to(weight.dtype)
    qkv, weight = normed or (grad_qkv, grad_qkv)
    tile = _tile(num_heads, size)
    blocks = triton.cdiv(num_heads, tile["HEADS"])
    programs = max(1, min(num_rows, _PROGRAMS // blocks))
    parts = grad_q.new_zeros(programs if normed else 0, num_heads, size, dtype=torch.float32)
    if num_rows:
        with on_device(grad_q):
            rotary_backward_kernel[(programs, blocks)](
                grad_q,
                grad_k,
                qkv,
                cos,
                sin,
                weight,
                grad_qkv,
                parts,
                num_rows,
                sizes[0],
                num_heads,
                size // 2,
                qkv.stride(0),
                grad_qkv.stride(0),
                cos.stride(0),
                epsilon,
                IS_NORMED=bool(normed),
                **tile,
                **options(num_warps=4),
            )
    return parts.sum(0).to(weight.dtype) if normed else None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        weight: Tensor | None,
        epsilon: float,
        sizes: list[int],
        backend: str,
    ):
        q, k, *kept = _forward(qkv, cos, sin, weight, epsilon, sizes, backend)
        v = qkv[:, sizes[0] + sizes[1] :]
        ctx.epsilon, ctx.backend, ctx.shape = epsilon, backend, qkv.shape
        if weight is None:
            ctx.save_for_backward(cos, sin)
            return q, k, v.clone()  # a view would keep all of qkv
        ctx.save_for_backward(cos, sin, qkv, weight, *kept)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        cos, sin, *normed = ctx.saved_tensors
        grad_qkv = grad_q.new_empty(ctx.shape)
        grad_qkv[:, grad_q.shape[1] + grad_k.shape[1] :] = grad_v
        grads = grad_q.contiguous(), grad_k.contiguous()
        grad_weight = _backward(*grads, grad_qkv, cos, sin, tuple(normed), ctx.epsilon, ctx.backend)
        return grad_qkv, None, None, grad_weight, None, None, None


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    weight: Tensor | None = None,
    epsilon: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, A, D) and keys (T, C, D), and unchanged values (T, C, D).

    qkv: (T, A + 2C, D), with contiguous heads in the order queries, keys, values; D is even.
    cos, sin: (T, 1, D), for the rows' positions, with two identical halves.
    weight: (A + C, D), the norms' weights for the heads of queries and keys; epsilon is added under the root. None for
    models without these norms. With a weight, the values are a view of qkv, which is saved for the backward pass.
    backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".
    Raises ValueError if the shapes do not match.
    """
    sizes, size = [num_heads, num_kv_heads], qkv.shape[-1]
    if qkv.ndim != 3 or qkv.shape[1] != num_heads + 2 * num_kv_heads or size % 2:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be (T, {num_heads} + 2 * {num_kv_heads}, D), the heads of queries, keys and "
            "values, and D even"
        )
    if not cos.shape == sin.shape == (len(qkv), 1, size):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {(len(qkv), 1, size)}")
    if weight is not None and weight.shape != (sum(sizes), size):
        raise ValueError(f"weight {tuple(weight.shape)} must be {(sum(sizes), size)}, a row a head")
    qkv = qkv if qkv.stride()[1:] == (qkv.shape[-1], 1) else qkv.contiguous()
    weight = None if weight is None else weight.contiguous()
    if torch.is_grad_enabled():
        return _Rotary.apply(qkv, cos, sin, weight, epsilon, sizes, backend)
    q, k, *_ = _forward(qkv, cos, sin, weight, epsilon, sizes, backend)
    return q, k, qkv[:, num_heads + num_kv_heads :]
