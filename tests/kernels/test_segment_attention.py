"""Packed attention with shared prefixes against a dense float64 softmax under the same mask."""

import pytest
import torch

from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_attention import (
    SegmentPlan,
    _dense_backward,
    _dense_forward,
    attention_backward,
    attention_with_lse,
    segment_attention,
)


def dense(q, k, v, segments, scale):
    allowed = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, end, prefix_start, prefix_end in segments.tolist():
        allowed[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        allowed[start:end, prefix_start:prefix_end] = True
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("iad,jad->aij", q, k) * scale
    return torch.einsum("aij,jad->iad", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def layout(*groups):
    """groups of (prompt length, completion lengths...) -> segments."""
    rows, at = [], 0
    for prompt, *completions in groups:
        start = at
        rows.append((at, at + prompt, 0, 0))
        at += prompt
        for length in completions:
            rows.append((at, at + length, start, start + prompt))
            at += length
    return torch.tensor(rows)


LAYOUTS = {
    "ragged": layout((7, 5, 1, 40), (3, 2, 2), (7, 17, 18)),
    "uniform": layout((8, 4, 4), (8, 4, 4)),
    "views": layout((70, 64, 64, 64, 64), (70, 90, 90, 90), (3, 2)),
    "one completion": layout((5, 3)),
    "no prefix": torch.tensor([[0, 6, 0, 0], [6, 7, 0, 0], [7, 30, 0, 0]]),
    "one token": layout((1, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_the_dense_mask_with_its_gradient(name, dtype, tolerance):
    segments = LAYOUTS[name]
    torch.manual_seed(0)
    num_rows = int(segments[:, 1].max())
    inputs = [torch.randn(num_rows, heads, 8, dtype=dtype) for heads in (4, 2, 2)]
    grad = torch.randn(num_rows, 4, 8, dtype=dtype)
    ours = [x.clone().requires_grad_() for x in inputs]
    oracle = [x.double().requires_grad_() for x in inputs]
    out = segment_attention(*ours, SegmentPlan(segments), scale=0.3)
    expected = dense(*oracle, segments, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    out.backward(grad)
    expected.backward(grad.double())
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_the_generic_path_equals_the_cpu_kernel(causal):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    out, lse = attention_with_lse(q, k, v, causal=causal, scale=0.3)
    generic_out, generic_lse = _dense_forward(q, k, v, causal, 0.3)
    torch.testing.assert_close(generic_out, out, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(generic_lse, lse, atol=1e-13, rtol=1e-13)
    expected = attention_backward(grad, q, k, v, out, lse, causal=causal, scale=0.3)
    for mine, theirs in zip(_dense_backward(grad, q, k, v, out, lse, causal, 0.3), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_that_share_the_rows_compute_what_one_computes(name, num_ranks):
    segments = LAYOUTS[name]
    num_rows = int(segments[:, 1].max())
    total = -(-num_rows // (2 * num_ranks)) * 2 * num_ranks
    if total > num_rows:
        segments = torch.cat([segments, torch.tensor([[num_rows, total, 0, 0]])])
    torch.manual_seed(0)
    q, k, v = (torch.randn(total, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(total, 4, 8, dtype=torch.float64)
    whole = segment_attention(q, k, v, SegmentPlan(segments), scale=0.3)
    shares = [RowShare(num_rows=total, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
    order = torch.cat([share.rows for share in shares])
    assert sorted(order.tolist()) == list(range(total))
    assert torch.equal(order[shares[0].gathered], torch.arange(total))
    parts = [
        segment_attention(q[share.rows], k[order], v[order], SegmentPlan(segments, share=share), scale=0.3)
        for share in shares
    ]
    for share, part in zip(shares, parts, strict=True):
        torch.testing.assert_close(part, whole[share.rows], atol=1e-13, rtol=1e-13)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    found = torch.autograd.grad(parts, (q, k, v), [grad[share.rows] for share in shares])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_repetition_is_bitwise_equal():
    segments = LAYOUTS["ragged"]
    q, k, v = (torch.randn(int(segments[:, 1].max()), 2, 8, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        out = segment_attention(q, k, v, SegmentPlan(segments), scale=1.0)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="q has 3 rows but the plan is for 2"):
        segment_attention(*(torch.zeros(3, 1, 8) for _ in range(3)), SegmentPlan(torch.tensor([[0, 2, 0, 0]])), scale=1)
    with pytest.raises(ValueError, match="prefix"):
        SegmentPlan(torch.tensor([[0, 2, 5, 9]]))


def test_rows_that_lie_together_are_read_without_a_copy():
    plan = SegmentPlan(LAYOUTS["views"])
    assert [call.q_rows for call in plan.own if call.num_blocks > 2] == [slice(70, 326), slice(396, 666)]
    assert [(call.q_rows, call.kv_rows) for call in plan.prefix[:2]] == [
        (slice(70, 326), slice(0, 70)),
        (slice(396, 666), slice(326, 396)),
    ]
