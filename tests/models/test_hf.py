"""Loading models and tokenizers, and what is refused."""

import json

import pytest
import torch
from builders import ALL_CONFIGS, byte_tokenizer, make_model
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral import tokenizer as mistral_tokenizer
from transformers.models.auto import tokenization_auto

from fastgrpo.config import UserError
from fastgrpo.models import hf
from fastgrpo.models.tiny import character_tokenizer


def saved(tmp_path, kind="qwen2", **changes):
    make_model(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return str(tmp_path)


@pytest.mark.parametrize("kind", ALL_CONFIGS)
def test_a_saved_directory_loads_bit_by_bit(tmp_path, kind):
    model = hf.load_model(saved(tmp_path, kind), device="cpu", dtype=torch.float32)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), make_model(kind).named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; use one of llama, mistral, qwen2, qwen3"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary type 'dynamic' is not supported",
        ),
    ],
)
def test_models_that_would_be_wrong_are_refused_by_name(tmp_path, changes, message):
    path = saved(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        hf.load_model(path, device="cpu", dtype=torch.float32)
    assert str(error.value).startswith(f"model.path={path}: {message}")


FULL, SLIDING = ["full_attention"] * 2, ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"layer_types": SLIDING}),
        ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 4096}),
        ("mistral", {"sliding_window": 4096, "layer_types": FULL}),
        ("mistral", {"layer_types": SLIDING}),
        ("llama", {"sliding_window": 4096}),
        ("llama", {"layer_types": SLIDING}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
    ],
)
def test_a_sliding_window_is_refused_wherever_it_is_written(tmp_path, kind, changes):
    path = saved(tmp_path, kind, **changes)
    with pytest.raises(UserError) as error:
        hf.load_config(path)
    message = "sliding-window attention is not supported; use a model without it"
    assert str(error.value) == f"model.path={path}: {message}"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"layer_types": FULL, "use_sliding_window": True, "sliding_window": 16}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 16}),
    ],
)
def test_a_sliding_window_that_no_layer_has_is_none(tmp_path, kind, changes):
    assert hf.load_config(saved(tmp_path, kind, **changes)).model_type == kind


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere"])
def test_a_path_that_is_nothing_is_refused(path):
    with pytest.raises(UserError, match="no such directory; give a Hugging Face model directory or a hub name"):
        hf.load_model(path, device="cpu", dtype=torch.float32)


def test_directories_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.load_model(str(tmp_path), device="cpu", dtype=torch.float32)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"model.path={tmp_path}: cannot be loaded: "):
        hf.load_model(str(tmp_path), device="cpu", dtype=torch.float32)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    saved(tmp_path)
    tokenizer = character_tokenizer("abc")
    tokenizer.save_pretrained(tmp_path)
    assert hf.load_tokenizer(str(tmp_path)).eos_token_id == 1
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no EOS token, so completions cannot end; set eos_token"):
        hf.load_tokenizer(str(tmp_path))


def test_a_mistrals_tokenizer_does_not_depend_on_other_packages(tmp_path, monkeypatch):
    """transformers as it is beside mistral-common, and a directory with both formats."""
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(mistral_tokenizer, "is_mistral_common_available", lambda: True)
    path, plain = saved(tmp_path, "mistral"), byte_tokenizer()
    plain.save_pretrained(path)
    (tmp_path / "tekken.json").write_text("{}")
    assert hf.load_tokenizer(path)("12 + 3")["input_ids"] == plain("12 + 3")["input_ids"]


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs():
    model, tokenizer = make_model(), character_tokenizer("abc")
    model.generation_config.eos_token_id = [7, 1]
    assert hf.stop_token_ids(model, tokenizer) == (1, 7)
    model.generation_config.eos_token_id = None
    assert hf.stop_token_ids(model, tokenizer) == (1,)


def test_characters_survive_the_tiny_tokenizer():
    tokenizer = character_tokenizer("0123456789+=;#")
    ids = tokenizer("12+3=;#")["input_ids"]
    assert len(ids) == 7
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12+3=;#"
