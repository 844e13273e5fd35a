"""RMSNorm, alone and behind the residual sum, in torch and in Triton, against its twin in float64."""

from functools import partial

import pytest
import torch
from layer_cases import BACKENDS, assert_like_twin, kept_for_gradient, leaf

from fastgrpo.kernels import reference
from fastgrpo.kernels import rms_norm as module
from fastgrpo.kernels.rms_norm import add_norm, rms_norm

EPSILON = 1e-5
SHAPES = [(1, 8), (33, 24), (5, 3, 130), (3, 2500)]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradient(shape, backend, dtype):
    torch.manual_seed(0)
    inputs = leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype, shift=1.0)
    ours = partial(rms_norm, epsilon=EPSILON, backend=backend)
    assert_like_twin(ours, partial(reference.rms_norm, epsilon=EPSILON), inputs, dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_norm_and_its_gradient(shape, backend, dtype):
    """In narrow types the twin is given what the sum rounds to: the norm is of that, as in Hugging Face's modules."""
    torch.manual_seed(0)
    stream, change = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    weight = leaf(shape[-1], dtype=dtype, shift=1.0)
    with torch.no_grad():
        change.copy_((stream + change).to(dtype) - stream)  # a sum that is exact
        change.copy_((stream + change) - stream)
    ours = partial(add_norm, epsilon=EPSILON, backend=backend)
    assert_like_twin(ours, partial(reference.add_norm, epsilon=EPSILON), (stream, change, weight), dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_sum_that_nothing_else_reads(backend):
    torch.manual_seed(0)
    inputs = leaf(9, 24, dtype=torch.float32), leaf(9, 24, dtype=torch.float32), leaf(24, dtype=torch.float32)
    assert_like_twin(
        lambda *x: add_norm(*x, EPSILON, backend=backend)[1],
        lambda *x: reference.add_norm(*x, EPSILON)[1],
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounds_where_hugging_face_rounds(backend):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    torch.manual_seed(0)
    norm = Qwen3RMSNorm(48, EPSILON).bfloat16()
    norm.weight.data.normal_()
    stream, change = torch.randn(2, 33, 48, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(stream, norm.weight, EPSILON, backend=backend), norm(stream))
    total, out = add_norm(stream, change, norm.weight, EPSILON, backend=backend)
    assert torch.equal(total, stream + change)
    assert torch.equal(out, norm(stream + change))


def test_more_rows_than_programs(monkeypatch):
    """Every program of the backward pass takes several rows, the last one fewer."""
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    torch.manual_seed(0)
    inputs = leaf(11, 2500, dtype=torch.float32), leaf(2500, dtype=torch.float32)
    ours = partial(rms_norm, epsilon=EPSILON, backend="triton")
    assert_like_twin(ours, partial(reference.rms_norm, epsilon=EPSILON), inputs, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_rows(backend):
    x, weight = leaf(0, 24, dtype=torch.float32), leaf(24, dtype=torch.float32)
    total, out = add_norm(x, x, weight, EPSILON, backend=backend)
    out.sum().backward()
    assert total.shape == out.shape == x.grad.shape == (0, 24)
    assert not weight.grad.any()


def test_refuses_by_name_what_does_not_fit():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight \(6,\).* must be \(8,\)"):
        rms_norm(x, weight[:6], EPSILON)
    with pytest.raises(ValueError, match=r"weight .* of torch.bfloat16 must be .* of torch.float32"):
        rms_norm(x, weight.bfloat16(), EPSILON)
    with pytest.raises(ValueError, match=r"stream \(2, 8\) and change \(1, 8\) must be alike"):
        add_norm(x, x[:1], weight, EPSILON)


def test_a_gpu_keeps_the_input_or_the_sum_alone():
    x, weight = leaf(9, 24, dtype=torch.float32), leaf(24, dtype=torch.float32)
    assert kept_for_gradient(lambda: rms_norm(x, weight, EPSILON, backend="triton"), [weight]) == x.nbytes
    assert kept_for_gradient(lambda: add_norm(x, x, weight, EPSILON, backend="triton"), [weight]) == x.nbytes
