"""The shapes that whole steps are measured at, with random weights."""

from __future__ import annotations

import copy

import torch
import transformers

HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
MODELS = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
    },
    "qwen3-0.6b": {**HEADS, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936},
    "qwen3-1.7b": {**HEADS, "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151936},
}


def random_model(config: transformers.PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The same random weights on every rank and for every provider."""
    torch.manual_seed(0)
    # A copy, because TRL gives its model's configuration a padding token, whose row would begin at zero.
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype)
