"""oneDNN's linear layer against a float64 product."""

import copy

import pytest
import torch
from torch import nn

from fastgrpo.kernels.cpu_linear import CpuLinear, can_pack, is_available, linear, pack, use_cpu_linear


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(50, 24, 40), (50, 40, 24), (8, 1, 3), (3, 24, 40), (129, 7, 5)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_float64_product_with_its_gradient(rows, inputs, outputs, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    tensors = [x, weight, torch.randn(outputs)] if bias else [x, weight]
    grad = torch.randn(rows, outputs)
    ours = [t.clone().requires_grad_() for t in tensors]
    oracle = [t.double().requires_grad_() for t in tensors]
    out, expected = linear(*ours), nn.functional.linear(*oracle)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-5, rtol=2e-5)
        assert mine.grad.is_contiguous()


def test_leading_dimensions_and_other_dtypes():
    layer = nn.Linear(6, 4)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    wide = copy.deepcopy(layer).double()
    assert torch.equal(linear(x.double(), wide.weight, wide.bias), wide(x.double()))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (6, 0)])
def test_an_empty_side_is_a_product_too(inputs, outputs):
    assert torch.equal(linear(torch.ones(20, inputs), torch.ones(outputs, inputs)), torch.zeros(20, outputs))


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
def test_a_packed_copy_multiplies_alike_for_any_number_of_rows(rows):
    x, weight, bias = torch.randn(rows, 24), torch.randn(40, 24), torch.randn(40)
    out = linear(x, pack(weight, 64), bias)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T + bias, atol=1e-5, rtol=1e-5)


def test_what_can_be_packed():
    assert can_pack(torch.ones(3, 2))
    assert not any(map(can_pack, (torch.ones(3, 2).double(), torch.ones(0, 2), torch.ones(3, 2, device="meta"))))


def test_a_model_keeps_its_parameters_and_names():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    before, x = copy.deepcopy(model), torch.randn(20, 6)
    use_cpu_linear(model)
    assert type(model[0]) is CpuLinear
    assert list(model.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(model(x), before(x))


def test_the_torch_we_install_has_it():
    assert is_available()


def test_second_derivative_is_refused():
    x, weight = torch.randn(9, 3, requires_grad=True), torch.randn(2, 3)
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
