"""Each layer part against the formula by autograd in float64, and what it keeps for its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgrpo.models.layers import add_norm, join, rms_norm, rotary, swiglu
from fastgrpo.models.storage import lay_out

T, H, A, D, EPSILON = 33, 24, 5, 8, 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
ANGLES = torch.rand(T, 1, D // 2, dtype=torch.float64).repeat(1, 1, 2)


def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def plain_rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def turned(qkv, angles=ANGLES):
    cos, sin = angles.cos().to(qkv), angles.sin().to(qkv)
    return rotary(qkv, cos, sin, A - 1)


def plain_turned(qkv):
    return torch.cat([plain_rotary(qkv[:, : A - 1], ANGLES.cos(), ANGLES.sin()), qkv[:, A - 1 :]], 1)


CASES = {
    "rms_norm": (lambda *x: rms_norm(*x, EPSILON), plain_norm, [(T, H), (H,)]),
    "rms_norm of heads": (lambda *x: rms_norm(*x, EPSILON), plain_norm, [(T, A, D), (A, D)]),
    "add_norm": (
        lambda *x: torch.stack(add_norm(*x, EPSILON)),
        lambda a, b, weight: torch.stack([a + b, plain_norm(a + b, weight)]),
        [(T, H), (T, H), (H,)],
    ),
    "add_norm, sum unused": (
        lambda *x: add_norm(*x, EPSILON)[1],
        lambda a, b, weight: plain_norm(a + b, weight),
        [(T, H), (T, H), (H,)],
    ),
    "rotary": (turned, plain_turned, [(T, A, D)]),
    "swiglu": (swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, [(T, H), (T, H)]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula_with_its_gradient(name, dtype):
    ours, formula, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    mine, oracle = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    out, expected = ours(*mine), formula(*oracle)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), out)
    grad = torch.randn(out.shape, dtype=torch.float64)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    for x, theirs in zip(mine, oracle, strict=True):
        scale = theirs.grad.abs().max()
        assert (x.grad.double() - theirs.grad).abs().max() <= 10 * tolerance * scale
    for x, before in zip(mine, inputs, strict=True):
        assert torch.equal(x, before)


def test_bfloat16_rounds_where_hugging_face_rounds():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    torch.manual_seed(0)
    norm = Qwen3RMSNorm(H, EPSILON).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(T, H, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, norm.weight, EPSILON), norm(x))
    gate, up = torch.randn(2, T, H, dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(2, 3), nn.Linear(3, 2)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(3, 2)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("laid_out", [True, False])
def test_join_is_the_concatenation_and_copies_nothing_that_lies_so(laid_out):
    module = Projections()
    if laid_out:
        lay_out(module)
    parts = [module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]
    whole = join(parts)
    assert torch.equal(whole, torch.cat(parts))
    assert (whole.data_ptr() == parts[0].data_ptr()) == laid_out
    grad = torch.randn_like(whole)
    whole.backward(grad)
    assert torch.equal(torch.cat([part.grad for part in parts]), grad)
    parts[1].requires_grad_(False)
    assert join(parts).requires_grad
