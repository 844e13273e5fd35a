"""A policy written tensor by tensor is the Hugging Face directory that the whole model would have been."""

import json

import pytest
import torch
from builders import byte_tokenizer, make_model
from transformers import AutoModelForCausalLM

from fastgrpo.models.export import save_stream
from fastgrpo.models.storage import weight_slices


def weights_of(model):
    return ((held.name, held.tensor) for held in weight_slices(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("limit", "num_files"), [(1 << 30, 1), (12_000, None)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe"])
def test_transformers_loads_what_was_streamed(tmp_path, kind, limit, num_files, tied):
    model = make_model(kind, tied=tied)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    (tmp_path / "model-00001-of-00009.safetensors").write_text("of an export before")
    save_stream(skeleton, byte_tokenizer(), weights_of(model), tmp_path, shard_bytes=limit)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == num_files or (num_files is None and len(files) > 2)
    if num_files is None:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert not list(tmp_path.glob("part-*"))


def test_an_interrupted_export_cannot_be_mistaken_for_a_model(tmp_path):
    model = make_model()

    def broken():
        yield from list(weights_of(model))[:5]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_stream(model, byte_tokenizer(), broken(), tmp_path, shard_bytes=4000)
    assert not list(tmp_path.glob("model*"))
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
