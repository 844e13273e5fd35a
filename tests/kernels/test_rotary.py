"""Queries and keys normalised and rotated, in torch and in Triton, against the twin in float64."""

import pytest
import torch
from layer_cases import BACKENDS, assert_like_twin, kept_for_gradient, leaf

from fastgrpo.kernels import reference
from fastgrpo.kernels import rotary as module
from fastgrpo.kernels.rotary import rotary

T, EPSILON = 7, 1e-5


def angles(dtype, size, num_rows=T):
    """Cosine and sine that the narrow type has exactly, so that they are the twin's too."""
    halves = torch.rand(num_rows, 1, size // 2, dtype=torch.float64).mul(6).repeat(1, 1, 2)
    return halves.cos().to(dtype), halves.sin().to(dtype)


def with_angles(function, cos, sin, heads, **options):
    def call(qkv, weight=None):
        if weight is not None:
            options.update(weight=weight, epsilon=EPSILON)
        return function(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), *heads, **options)

    return call


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "size"), [((1, 1), 8), ((14, 2), 64), ((3, 3), 80), ((40, 5), 16)])
def test_equals_the_twin_with_its_gradient(heads, size, normed, backend, dtype):
    torch.manual_seed(0)
    qkv = leaf(T, heads[0] + 2 * heads[1], size, dtype=dtype)
    weight = [leaf(sum(heads), size, dtype=dtype, shift=1.0)] if normed else []
    cos, sin = angles(dtype, size)
    ours = with_angles(rotary, cos, sin, heads, backend=backend)
    assert_like_twin(ours, with_angles(reference.rotary, cos, sin, heads), (qkv, *weight), dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_of_a_wider_product_and_strided_gradients(normed, backend):
    torch.manual_seed(0)
    wide, cos_sin = leaf(T, 80, dtype=torch.float32), angles(torch.float32, 8)
    weight = [leaf(5, 8, dtype=torch.float32)] if normed else []

    def through(function):
        def call(wide, *weight):
            qkv = wide[:, 3:67].unflatten(-1, (8, 8))  # (T, 3 + 2 + 3 heads of it unused ones)
            q, k, v = function(qkv[:, :7], *weight)
            return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

        return call

    ours = with_angles(rotary, *cos_sin, (3, 2), backend=backend)
    twin = with_angles(reference.rotary, *cos_sin, (3, 2))
    assert_like_twin(through(ours), through(twin), (wide, *weight), torch.float32)


def test_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 6)
    torch.manual_seed(0)
    qkv, weight = leaf(T, 50, 16, dtype=torch.float32), leaf(45, 16, dtype=torch.float32)
    cos_sin = angles(torch.float32, 16)
    ours = with_angles(rotary, *cos_sin, (40, 5), backend="triton")
    assert_like_twin(ours, with_angles(reference.rotary, *cos_sin, (40, 5)), (qkv, weight), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounds_like_hugging_face_with_one_rounding_less(backend):
    """Theirs rounds both products and their sum; ours the sum alone."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    torch.manual_seed(0)
    norm = Qwen3RMSNorm(16, EPSILON).bfloat16()
    norm.weight.data.normal_()
    qkv = torch.randn(T, 4, 16, dtype=torch.bfloat16)
    cos, sin = angles(torch.bfloat16, 16)
    weight = norm.weight.expand(3, -1)
    q, k, v = rotary(qkv, cos, sin, 2, 1, weight=weight, epsilon=EPSILON, backend=backend)
    normed = norm(qkv[:, :3]).transpose(0, 1)[None]  # (1, heads, T, D)
    theirs, _ = apply_rotary_pos_emb(normed, normed, cos.transpose(0, 1), sin.transpose(0, 1))
    exact, _ = apply_rotary_pos_emb(*[x.double() for x in (normed, normed, cos.transpose(0, 1), sin.transpose(0, 1))])
    ours = torch.cat([q, k], 1).transpose(0, 1)[None]
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    assert torch.equal(ours, exact.bfloat16()) or backend == "torch"
    assert torch.equal(v, qkv[:, 3:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_keep_the_product_alive_only_where_its_gradient_needs_it(backend):
    qkv, weight = leaf(T, 4, 16, dtype=torch.float32), leaf(3, 16, dtype=torch.float32)
    cos_sin = angles(torch.float32, 16)
    *_, v = rotary(qkv, *cos_sin, 2, 1, backend=backend)
    assert v.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    *_, v = rotary(qkv, *cos_sin, 2, 1, weight=weight, epsilon=EPSILON, backend=backend)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_rows(backend):
    qkv, weight = leaf(0, 4, 16, dtype=torch.float32), leaf(3, 16, dtype=torch.float32)
    cos_sin = angles(torch.float32, 16, num_rows=0)
    q, *_ = rotary(qkv, *cos_sin, 2, 1, weight=weight, epsilon=EPSILON, backend=backend)
    q.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert not weight.grad.any()


def test_refuses_by_name_what_does_not_fit():
    qkv, cos_sin = torch.ones(T, 4, 16), angles(torch.float32, 16)
    with pytest.raises(ValueError, match=r"qkv \(7, 4, 16\) must be \(T, 3 \+ 2 \* 1, D\)"):
        rotary(qkv, *cos_sin, 3, 1)
    with pytest.raises(ValueError, match=r"must be \(7, 1, 16\)"):
        rotary(qkv, *angles(torch.float32, 8), 2, 1)
    with pytest.raises(ValueError, match=r"weight \(2, 16\) must be \(3, 16\), a row a head"):
        rotary(qkv, *cos_sin, 2, 1, weight=torch.ones(2, 16))


def test_a_gpu_keeps_the_product_where_it_is_normed_and_nothing_else():
    qkv, weight = leaf(T, 4, 16, dtype=torch.float32), leaf(3, 16, dtype=torch.float32)
    cos_sin = angles(torch.float32, 16)
    known, given = [weight, *cos_sin], {"weight": weight, "epsilon": EPSILON}
    assert kept_for_gradient(lambda: rotary(qkv, *cos_sin, 2, 1, **given, backend="triton"), known) == qkv.nbytes
    assert kept_for_gradient(lambda: rotary(qkv, *cos_sin, 2, 1, backend="triton"), known) == 0
