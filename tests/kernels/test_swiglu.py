"""SwiGLU of two tensors and of one with both halves, in torch and in Triton, against its twin in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layer_cases import BACKENDS, assert_like_twin, leaf

from fastgrpo.kernels import reference
from fastgrpo.kernels.swiglu import swiglu

SHAPES = [(1, 8), (33, 24), (5, 1, 130), (3, 2500)]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin_with_its_gradient(shape, backend, dtype):
    torch.manual_seed(0)
    inputs = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    assert_like_twin(partial(swiglu, backend=backend), reference.swiglu, inputs, dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_side_by_side(shape, backend, dtype):
    torch.manual_seed(0)
    gate_up = leaf(*shape[:-1], 2 * shape[-1], dtype=dtype)

    def twin(x):
        return reference.swiglu(*x.chunk(2, -1))

    assert_like_twin(partial(swiglu, backend=backend), twin, (gate_up,), dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_far_from_zero(backend):
    """Where the sigmoid is 0 or 1 in float32, and exp(-gate) overflows."""
    gate = torch.tensor([[-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0]], requires_grad=True)
    assert_like_twin(
        partial(swiglu, backend=backend), reference.swiglu, (gate, leaf(1, 7, dtype=torch.float32)), torch.float32
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounds_where_hugging_face_rounds(backend):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 33, 48, dtype=torch.bfloat16)
    ours, theirs = swiglu(gate, up, backend=backend), F.silu(gate) * up
    # exp differs in the last bit between torch and the interpreter's numpy, which seldom moves a rounding
    assert (ours != theirs).float().mean() <= (0.0 if backend == "torch" else 0.01)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_rows(backend):
    gate_up = leaf(0, 48, dtype=torch.float32)
    swiglu(gate_up, backend=backend).sum().backward()
    assert gate_up.grad.shape == (0, 48)


def test_refuses_by_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"gate \(2, 7\) both side by side must be even"):
        swiglu(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"gate \(2, 7\) and up \(2, 6\) must be alike"):
        swiglu(torch.ones(2, 7), torch.ones(2, 6))
