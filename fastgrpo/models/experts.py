"""A mixture of experts, as transformers has it: where its routers are, and how their choices are kept."""

from __future__ import annotations

from typing import Any

import torch

from fastgrpo.models.decoder import CausalLM


def routers_of(model: CausalLM) -> list[Any]:
    """The routers in the order of their layers; each returns (T, E) logits, (T, k) weights and (T, k) experts."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def layers_with_experts(config: Any) -> list[int]:
    """The numbers of the layers that have any, by a model's configuration; empty for a dense model."""
    if not getattr(config, "num_experts", 0):
        return []
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    ]


def choice_dtype(num_experts: int) -> torch.dtype:
    """The narrowest type that numbers the experts; torch can do little with unsigned ones beyond uint8."""
    return torch.uint8 if num_experts <= 256 else torch.int16
