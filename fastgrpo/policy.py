"""The policy that a configuration asks for, as a Hugging Face model: loaded, described and written out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import Config, UserError
from fastgrpo.data import ALPHABET, PromptSets
from fastgrpo.kernels import varlen_kernels
from fastgrpo.learner.protocol import Learner
from fastgrpo.models import hf, tiny
from fastgrpo.models.export import save_stream
from fastgrpo.models.hf import CausalLM
from fastgrpo.models.lora import Adapters
from fastgrpo.models.shape import Shape
from fastgrpo.warm_start import cached_path, reserve, store, warm_start

QUICKSTART_CONTEXT = 256
"""Tokens that the quickstart's model can read."""


def device_of(config: Config) -> tuple[str, torch.dtype]:
    """Where the model lives and in what type."""
    name = config.cluster.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"cluster.device={name}: this machine has no CUDA device; use cpu or auto")
    takes_gpus = config.learner.kind == "megatron" or config.sampler.kind == "vllm"
    if device == "cpu" and takes_gpus and torch.cuda.is_available():
        raise UserError(
            "cluster.device=cpu: Megatron and vLLM compute on the GPU that they see; hide it with CUDA_VISIBLE_DEVICES="
        )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes["auto"] = torch.float32 if device == "cpu" else torch.bfloat16
    return device, dtypes[config.cluster.dtype]


def config_of_model(config: Config, tokenizer: Any) -> Any:
    """The policy's transformers configuration, before anything is loaded."""
    if config.model.path is None:
        return tiny.model_config(config.model, tokenizer, max_length=QUICKSTART_CONTEXT)
    return hf.load_config(config.model.path)


def model_directory(config: Config) -> str:
    """Where the policy's configuration and first weights are."""
    return config.model.path or str(cached_path(config, ALPHABET))


def load_model(config: Config, tokenizer: Any, prompts: PromptSets, notify: Callable[[str], None]) -> CausalLM:
    """The policy, on its device. Raises UserError for what is wrong with it."""
    device, dtype = device_of(config)
    if config.model.path is None:
        return hf.prepare(_quickstart_model(config, tokenizer, prompts, notify).to(device, dtype))
    return hf.load_model(config.model.path, device=device, dtype=dtype)


def _quickstart_model(config: Config, tokenizer: Any, prompts: PromptSets, notify: Callable[[str], None]) -> CausalLM:
    path = cached_path(config, ALPHABET)
    if not path.is_dir():
        reserve(path)
        model = tiny.build_model(config.model, tokenizer, max_length=QUICKSTART_CONTEXT, seed=config.seed)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        notify(
            f"building a {size:.1f}M-parameter model and warm-starting it on worked {config.data.operation} problems"
        )
        warm_start(model, tokenizer, prompts.train, config.model.warm_start, seed=config.seed, report=notify)
        store(model, tokenizer, path)
    notify(f"starting from the warm-started model in {path}")
    # Read back even when just made: a run never depends on whether the cache was there.
    return hf.load_model(str(path), device="cpu", dtype=torch.float32)


def describe(model: CausalLM, device: str) -> str:
    """The policy in a few words."""
    num_params = sum(p.numel() for p in model.parameters())
    where = f"{model.dtype} on {device}".removeprefix("torch.")
    attention = "" if device == "cpu" else f", {_attention(model)}"
    return f"{model.config.model_type}, {num_params / 1e6:.1f}M parameters, {where}{attention}"


def _attention(model: CausalLM) -> str:
    """Whose attention a GPU computes."""
    kernel, head_size = varlen_kernels.chosen(), Shape.of(model.config).head_size
    if kernel.takes(torch.empty(0, head_size, dtype=model.dtype, device="meta")):
        return f"flash attention of {kernel.name}"
    kind = str(model.dtype).removeprefix("torch.")
    return f"attention in plain torch, slow: no flash kernel is for {kind} and heads of {head_size}"


def export(path: Path, learner: Learner, model: CausalLM | Adapters, tokenizer: Any) -> None:
    """Write the policy as a Hugging Face directory; every rank calls it, because the weights may be on all of them."""
    if isinstance(model, Adapters):
        tensors = dict(learner.named_adapters())
        if learner.ranks.is_main:
            model.save_pretrained(path, tensors)
            tokenizer.save_pretrained(path)
        return
    if learner.ranks.from_main(model.device.type != "meta"):
        if learner.ranks.is_main:
            hf.save_pretrained(model, tokenizer, path)
        return
    weights = learner.named_weights()  # all ranks go through it together, and the main one writes
    if learner.ranks.is_main:
        save_stream(model, tokenizer, weights, path)
    else:
        for _ in weights:
            pass
