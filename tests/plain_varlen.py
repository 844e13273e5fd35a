"""What a variable-length flash kernel computes, in plain torch."""

import math

import torch


def spans(s):
    """(query rows, key rows) of every sequence, after what the flash kernels check or rely on."""
    for bounds, longest in ((s.cu_q, s.max_q), (s.cu_k, s.max_k)):
        assert bounds.dtype == torch.int32
        assert int(bounds.diff().max()) == longest
    bounds = zip(*(cu[i:].tolist() for cu in (s.cu_q, s.cu_k) for i in (0, 1)), strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds]


def scores(q, k, causal, scale):
    """(A, L, M), keys repeated for the heads that share them."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("iad,jad->aij", q, k) * scale
    assert not causal or len(q) == len(k)
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")) if causal else s


def plain_forward(q, k, v, sequences, causal, scale):
    out, lse = torch.full_like(q, math.nan), q.new_full((q.shape[1], len(q)), math.nan)
    for i, j in spans(sequences):
        s = scores(q[i], k[j], causal, scale)
        values = v[j].repeat_interleave(q.shape[1] // v.shape[1], 1)
        lse[:, i] = s.logsumexp(-1) if s.shape[-1] else math.inf  # as FlashAttention-2 marks rows without a key
        out[i] = torch.einsum("aij,jad->iad", s.softmax(-1), values)
    return out, lse


def plain_backward(grad, q, k, v, out, lse, sequences, causal, scale):
    assert grad.is_contiguous()
    assert lse.is_contiguous()
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    for i, j in spans(sequences):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[j].repeat_interleave(groups, 1) for x in (k, v))
        p = (scores(q[i], k[j], causal, scale) - lse[:, i, None]).exp()
        dp = torch.einsum("iad,jad->aij", grad[i], values) - (grad[i] * out[i]).sum(-1).T[..., None]
        dq[i] = torch.einsum("aij,jad->iad", p * dp, keys) * scale
        dk[j] = (torch.einsum("aij,iad->jad", p * dp, q[i]) * scale).unflatten(1, (-1, groups)).sum(2)
        dv[j] = torch.einsum("aij,iad->jad", p, grad[i]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv
