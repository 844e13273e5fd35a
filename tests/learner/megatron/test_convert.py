"""What is refused on the way in; the way there and back is in test_learner.py, in every layout."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.hf_weights import from_directory

TINY = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    read = from_directory(tmp_path)
    assert torch.equal(read("a"), torch.ones(1))
    with pytest.raises(UserError, match=r"the weights hold no tensor 'lm_head.weight'"):
        read("lm_head.weight")


def test_a_sharded_directory_is_read_through_its_index(tmp_path):
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY)).save_pretrained(tmp_path, max_shard_size="1KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert from_directory(tmp_path)("model.norm.weight").shape == (8,)


def test_experts_may_be_stacked_or_apart(tmp_path):
    stem = "model.layers.0.mlp.experts"
    gate_up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    save_file({f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}, tmp_path / "model.safetensors")
    read = from_directory(tmp_path)
    assert torch.equal(read(f"{stem}.1.gate_proj.weight"), gate_up[1, :3])
    assert torch.equal(read(f"{stem}.1.up_proj.weight"), gate_up[1, 3:])
    assert torch.equal(read(f"{stem}.0.down_proj.weight"), down[0])


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(UserError, match="learner=megatron reads safetensors from a local directory"):
        from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.GPT2Config(),
            "model type 'gpt2' is not supported; use one of llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        (transformers.Qwen3MoeConfig(**TINY, mlp_only_layers=[0]), "a model with experts in some layers only"),
        (transformers.LlamaConfig(**TINY, attention_bias=True), "a model with attention_bias=true is not supported"),
        (transformers.LlamaConfig(**TINY, mlp_bias=True), "a model with mlp_bias=true is not supported"),
        (transformers.Qwen2Config(**TINY, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (
            transformers.Qwen2Config(
                **TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rotary type 'dynamic' is not supported",
        ),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Architecture.of(config)
