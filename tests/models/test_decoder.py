"""The decoder against the Hugging Face model whose parameters it computes with."""

import pytest
import torch
from builders import ALL_CONFIGS, CONFIGS, make_model
from torch import nn

from fastgrpo.models import decoder
from fastgrpo.models.attention import PackedAttention
from fastgrpo.models.decoder import Decoder, hidden_states, recompute_activations
from fastgrpo.models.hf import prepare

IDS = torch.arange(2, 14)
SEGMENTS = torch.tensor([[0, 5, 0, 0], [5, 12, 0, 5]])


def hidden(model):
    return hidden_states(model, IDS, torch.arange(12), PackedAttention(SEGMENTS))


def gradients(model, out):
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [parameter.grad for parameter in model.model.parameters()]


@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("kind", ALL_CONFIGS)
def test_equals_hugging_faces_forward_and_gradient(kind, laid_out):
    model, plain = make_model(kind), make_model(kind)
    mine, theirs = hidden(prepare(model) if laid_out else model), plain.model(IDS[None]).last_hidden_state[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    expected = gradients(plain, theirs)
    for gradient, other in zip(gradients(model, mine), expected, strict=True):
        assert (gradient - other).norm() <= 2e-5 * torch.stack([g.norm() for g in expected]).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_copies_compute_the_same_and_live_with_their_decoder(kind, monkeypatch):
    model = prepare(make_model(kind))
    with torch.no_grad():
        packed = Decoder(model, pack_for=12)
        assert packed.logits.keywords["weight"].is_mkldnn
        found = packed.hidden_states(IDS, torch.arange(12), PackedAttention(SEGMENTS))
        torch.testing.assert_close(found, hidden(model), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed.logits(found), model.lm_head(found), atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(decoder, "PACKED_LIMIT", 1000)
        assert Decoder(model, pack_for=12).logits.keywords["weight"] is model.lm_head.weight


def test_recomputed_activations_change_no_bit():
    plain, recomputing = make_model("qwen3").train(), make_model("qwen3").train()
    recompute_activations(recomputing)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = hidden(recomputing)
    assert sum(saved) < 12 * 32 * 8  # a few rows of every layer's input
    expected = gradients(plain, hidden(plain))
    assert all(torch.equal(a, b) for a, b in zip(gradients(recomputing, out), expected, strict=True))


def test_modules_that_are_no_plain_matrix_or_swiglu_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Experts(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.dense = mlp

        def forward(self, x):
            assert x.ndim == 3
            return -self.dense(x)

    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.__class__ = Doubled
        layer.mlp = Experts(layer.mlp)
    expected = model.model(IDS[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden(model), expected, atol=1e-5, rtol=1e-5)
