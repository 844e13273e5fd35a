"""Fused and padded memory under parameters that keep their names, shapes and values."""

import pytest
import torch
from builders import CONFIGS, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from fastgrpo.models.hf import prepare
from fastgrpo.models.storage import fused, join, lay_out, weight_slices


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_laying_out_changes_no_name_shape_or_value(kind, tied):
    model, before = make_model(kind, tied=tied), make_model(kind, tied=tied).state_dict()
    parameters = dict(model.named_parameters())
    lay_out(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_matrices_are_the_parameters_memory(kind):
    model = make_model(kind)
    lay_out(model)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    qkv = fused([part.weight for part in parts])
    assert torch.equal(qkv, torch.cat([part.weight for part in parts]))
    attention.k_proj.weight.data.fill_(7)
    assert bool((qkv[32:48] == 7).all())
    if kind == "qwen2":
        assert fused([part.bias for part in parts]).shape == (64,)
    assert fused([mlp.gate_proj.weight, mlp.up_proj.weight]).shape == (96, 32)
    assert fused([mlp.up_proj.weight, mlp.gate_proj.weight]) is None


def test_tensors_apart_are_not_fused():
    attention = make_model().model.layers[0].self_attn
    assert fused([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is None


def test_training_a_laid_out_model_is_the_same():
    models = [make_model(), make_model()]
    lay_out(models[1])
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_laid_out_model_saves_and_loads(tmp_path, tied):
    model = prepare(make_model(tied=tied))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_slices_name_every_parameter_once(tied):
    model = prepare(make_model(tied=tied))
    slices = weight_slices(model)
    assert [s.name for s in slices] == [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in [s.name for s in slices]) != tied
    for s in slices:
        assert s.tensor.data_ptr() == model.get_parameter(s.name).data_ptr()
    embedding = slices[0]
    assert (embedding.full_shape, embedding.num_padding_rows) == ((61, 32), 3)
    padding = embedding.tensor.as_strided((3, 32), (32, 1), embedding.tensor.storage_offset() + 61 * 32)
    assert not padding.any()


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
