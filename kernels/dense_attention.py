"""One dense attention with its log-sum-exp, its backward under a larger softmax, and the merge of two.

Letters: B blocks of L queries and M keys in one call, A query heads, C key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v and the softmax's log-sum-exp, without autograd.

    q: (B, A, L, D); k, v: (B, C, M, D) with A a multiple of C; causal needs L == M; bias: (B, 1, 1, M), q's dtype.
    Returns (B, A, L, D) in q's dtype and (B, A, L) in float32 (float64 for float64).
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if fits_flash(q) and bias is None:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    return _plain_forward(q, k, v, causal, scale, bias)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over both key sets, from the attention over each: (..., D) outputs and their (...) lse."""
    other_share = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # float32 for narrower outputs, which are rounded once
    wide = torch.promote_types(out.dtype, other_share.dtype)
    merged = out.to(wide).lerp(other_out.to(wide), other_share.to(wide))
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention_with_lse's output; `out` and `lse` may be those of a larger softmax that contains it."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return _plain_backward(grad, q, k, v, out, lse, causal, scale)


def fits_flash(q: Tensor) -> bool:
    """Whether flash attention has a kernel for (..., D) queries: half precision, D a multiple of 8 up to 256."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _plain_forward(q, k, v, causal: bool, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain torch, for dtypes and head sizes without a flash kernel."""
    scores = _scores(q, k, causal, scale)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp().to(v.dtype)
    return probs @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def _plain_backward(grad, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    probs = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    dscores = (probs * ((grad @ v_all.transpose(-1, -2)) - delta) * scale).to(q.dtype)
    dk, dv = dscores.transpose(-1, -2) @ q, probs.to(q.dtype).transpose(-1, -2) @ grad
    return dscores @ k_all, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, float("-inf"))
    return scores
