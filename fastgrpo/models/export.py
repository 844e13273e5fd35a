"""Writing a policy whose tensors come one at a time, never all of them in one process's memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastgrpo.models.decoder import CausalLM

SHARD_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"


def save_stream(
    skeleton: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    weights: Iterable[tuple[str, Tensor]],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory that AutoModelForCausalLM loads, holding one shard of it at most.

    skeleton: the model without its weights, for configuration and dtype. weights: under their names in a checkpoint,
    a tied head once. An interrupted export leaves no index, and no single file, that could be loaded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    skeleton.config.save_pretrained(directory)
    skeleton.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in _shards(weights, skeleton.dtype, shard_bytes):
        save_file(shard, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for number, name in enumerate(names):
        (directory / f"part-{number}").rename(directory / name)
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _shards(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int):
    """Consecutive tensors on the CPU, of `limit` bytes at most (or one tensor, where that alone is more)."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights:
        tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard
