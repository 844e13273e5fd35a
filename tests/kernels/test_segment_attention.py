"""Packed attention with shared prefixes against the specification's dense mask in float64.

A GPU's way, two calls of a variable-length kernel, is computed here around a kernel of plain torch; what it asks of the
real ones is checked on fake CUDA tensors.
"""

import importlib.util
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from plain_varlen import plain_backward, plain_forward
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.kernels import merge_attention, reference, varlen_kernels
from fastgrpo.kernels.dense_attention import _plain_backward, _plain_forward, attention_backward, attention_with_lse
from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.kernels.varlen_kernels import NAMES, Sequences, VarlenKernel, choose


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
    "no rows": layout((4, 0, 3, 0), (1, 0), (2, 5)),
    "prompts alone": layout((9,), (4,), (3, 6, 2), (5,)),
}


PLAIN = VarlenKernel("plain", plain_forward, plain_backward, takes=lambda q: True)
WAYS = pytest.mark.parametrize("kernel", [None, PLAIN], ids=["dense", "varlen"])


@WAYS
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_the_dense_mask_with_its_gradient(name, dtype, tolerance, kernel):
    segments = LAYOUTS[name]
    torch.manual_seed(0)
    num_rows = int(segments[:, 1].max())
    inputs = [torch.randn(num_rows, heads, 8, dtype=dtype) for heads in (4, 2, 2)]
    grad = torch.randn(4, num_rows, 8, dtype=dtype).transpose(0, 1)  # a gradient comes in any layout
    ours = [x.clone().requires_grad_() for x in inputs]
    oracle = [x.double().requires_grad_() for x in inputs]
    out = segment_attention(*ours, SegmentPlan(segments, kernel=kernel), scale=0.3)
    expected = reference.segment_attention(*oracle, segments, scale=0.3)
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
    generic_out, generic_lse = _plain_forward(q, k, v, causal, 0.3)
    torch.testing.assert_close(generic_out, out, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(generic_lse, lse, atol=1e-13, rtol=1e-13)
    expected = attention_backward(grad, q, k, v, out, lse, causal=causal, scale=0.3)
    for mine, theirs in zip(_plain_backward(grad, q, k, v, out, lse, causal, 0.3), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@WAYS
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_that_share_the_rows_compute_what_one_computes(name, num_ranks, kernel):
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
    assert all(torch.equal(order[share.held], share.rows) for share in shares)
    plans = [SegmentPlan(segments, share=share, kernel=kernel) for share in shares]
    parts = [
        segment_attention(q[share.rows], k[order], v[order], plan, scale=0.3)
        for share, plan in zip(shares, plans, strict=True)
    ]
    for share, part in zip(shares, parts, strict=True):
        torch.testing.assert_close(part, whole[share.rows], atol=1e-13, rtol=1e-13)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    found = torch.autograd.grad(parts, (q, k, v), [grad[share.rows] for share in shares])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_gpu_computes_what_float64_does(name):
    try:
        kernel = choose(name)
    except ValueError as error:
        pytest.skip(str(error))
    segments = LAYOUTS["ragged"]
    plan, total = SegmentPlan(segments, "cuda", kernel=kernel), int(segments[:, 1].max())
    exact = [torch.randn(total, heads, 64).bfloat16().double().requires_grad_() for heads in (4, 2, 2, 4)]
    half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    expected = reference.segment_attention(*exact[:3], segments, scale=0.125)
    out = segment_attention(*half[:3], plan, scale=0.125)
    expected = (expected, *torch.autograd.grad(expected, exact[:3], exact[3]))
    out = (out, *torch.autograd.grad(out, half[:3], half[3]))
    for mine, theirs in zip(out, expected, strict=True):
        assert (mine.cpu().double() - theirs).norm() < 1e-2 * theirs.norm()


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
    for other in ([[0, 2, 0, 0], [3, 4, 0, 0]], [[0, 2, 0, 0], [1, 4, 0, 0]], [[2, 4, 0, 0], [0, 2, 0, 0]]):
        with pytest.raises(ValueError, match="does not follow"):
            SegmentPlan(torch.tensor(other))


def test_rows_that_lie_together_are_read_without_a_copy():
    plan = SegmentPlan(LAYOUTS["views"]).dense
    assert [call.q_rows for call in plan.own if call.num_blocks > 2] == [slice(70, 326), slice(396, 666)]
    assert [(call.q_rows, call.kv_rows) for call in plan.prefix[:2]] == [
        (slice(70, 326), slice(0, 70)),
        (slice(396, 666), slice(326, 396)),
    ]


def test_a_gpu_needs_two_calls_and_copies_only_prefixes_that_lie_apart():
    calls = []

    def counting(q, k, v, sequences, causal, scale):
        calls.append((len(q), len(k), causal))
        return plain_forward(q, k, v, sequences, causal, scale)

    for name, num_keys in (("ragged", 7 + 3 + 7), ("uniform", 16), ("views", 70 + 70 + 3)):
        segments, total = LAYOUTS[name], int(LAYOUTS[name][:, 1].max())
        plan = SegmentPlan(segments, kernel=replace(PLAIN, forward=counting))
        segment_attention(*(torch.randn(total, 2, 8) for _ in range(3)), plan, scale=1.0)
        assert calls == [(total, total, True), (total, num_keys, False)]
        calls.clear()
    one = SegmentPlan(layout((5, 3, 4)), kernel=PLAIN)
    assert one.varlen.seen_rows == slice(0, 5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_torchs_kernels_are_called_as_a_gpu_wants_it(num_kv_heads, monkeypatch):
    """Fake tensors have a device and no numbers: mixing devices, or waiting for a number, raises."""
    merged = []
    monkeypatch.setattr(merge_attention, "merge_kernel", {(13,): lambda *args, **_: merged.append(args)})
    way, total = SegmentPlan(LAYOUTS["ragged"], kernel=choose("torch")).varlen, int(LAYOUTS["ragged"][:, 1].max())
    with FakeTensorMode():

        def fake(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        for name in ("own", "seen"):
            sequences = getattr(way, name)
            cu_q, cu_k = (fake(len(cu), dtype=torch.int32) for cu in (sequences.cu_q, sequences.cu_k))
            setattr(way, name, replace(sequences, cu_q=cu_q, cu_k=cu_k))
        way.seen_rows = fake(len(way.seen_rows), dtype=torch.int64)
        inputs = [fake(total, heads, 64) for heads in (4, num_kv_heads, num_kv_heads)]
        out, lse = way.forward(*inputs, 0.125)
        grads = way.backward(fake(total, 4, 64), *inputs, out, lse, 0.125)
    ((_, _, part, part_lse, *_),) = merged  # one program for 32 of 102 x 4 outputs
    for lse_ in (lse, part_lse):
        assert (lse_.shape, lse_.dtype, lse_.is_contiguous()) == ((4, total), torch.float32, True)
    for x, like in zip((out, part, *grads), (inputs[0], inputs[0], *inputs), strict=True):
        assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def test_autograd_waits_for_no_gpu():
    """Nor do meta tensors have numbers to wait for; autograd knows no fake GPU on a machine without one."""
    total = int(LAYOUTS["ragged"][:, 1].max())
    q, k, v = (
        torch.empty(total, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    segment_attention(
        q, k, v, SegmentPlan(LAYOUTS["ragged"], "meta", kernel=choose("torch")), scale=1.0
    ).sum().backward()
    assert (q.grad.shape, k.grad.shape, v.grad.shape) == (q.shape, k.shape, v.shape)


def test_what_flash_attention_cannot_compute_is_computed_densely():
    plan = SegmentPlan(LAYOUTS["one token"], kernel=choose("torch"))
    taken = {
        (dtype, size): plan.way(torch.empty(2, 1, size, dtype=dtype)) is plan.varlen
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for size in (64, 100, 128, 256, 264)
    }
    half = (torch.bfloat16, torch.float16)
    assert taken == {(dtype, size): dtype in half and size in (64, 128, 256) for dtype, size in taken}
    assert SegmentPlan(LAYOUTS["one token"]).kernel is None  # on a CPU


def test_a_kernel_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="choose one of auto, torch, flash_attn, flash_attn_3"):
        choose("flash")
    for name in ("flash_attn", "flash_attn_3"):
        if (
            importlib.util.find_spec({"flash_attn": "flash_attn_2_cuda", "flash_attn_3": "flash_attn_interface"}[name])
            is None
        ):
            with pytest.raises(ValueError, match=f"the package {name} is not installed"):
                choose(name)
    assert choose("auto").name == ("torch" if importlib.util.find_spec("flash_attn_2_cuda") is None else "flash_attn")


def package_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
):  # fmt: skip
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *plain_forward(q, k, v, sequences, causal, softmax_scale), None, None


def package_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = plain_backward(dout, q, k, v, out, softmax_lse, sequences, causal, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)


def test_the_package_is_called_by_its_signature(monkeypatch):
    """The stand-in has the arguments of flash_attn 2.7 and 2.8, named and ordered as there."""
    package = ModuleType("flash_attn.flash_attn_interface")
    package._flash_attn_varlen_forward, package._flash_attn_varlen_backward = package_forward, package_backward
    monkeypatch.setattr(varlen_kernels, "_chosen", None)
    monkeypatch.setattr(varlen_kernels, "find_spec", {"flash_attn_2_cuda": True}.get)
    monkeypatch.setattr(varlen_kernels, "version", lambda _: "2.8.3.post1")
    monkeypatch.setattr(varlen_kernels, "import_module", {package.__name__: package}.__getitem__)
    kernel = choose("auto")
    assert kernel.name == "flash_attn"
    test_equals_the_dense_mask_with_its_gradient("ragged", torch.float64, 1e-13, replace(kernel, takes=PLAIN.takes))
    monkeypatch.setattr(varlen_kernels, "version", lambda _: "2.6.3")
    with pytest.raises(ValueError, match=r"flash_attn is 2\.6\.3 here; install 2\.7 or newer"):
        choose("flash_attn")
