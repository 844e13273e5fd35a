"""What a model is made of, read once from its Hugging Face configuration; everything else here asks this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.models.shape import MODEL_TYPES, Shape


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """Low-rank adapters, the same in every layer: W + scale B A.

    Example: AdapterShape(rank=16, scale=2.0, targets=("self_attn.q_proj", "self_attn.v_proj"))
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    """The matrices of a layer that have some, by their Hugging Face names."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Shape):
    """A decoder of the Llama family, dense or with a mixture of experts in every layer.

    Example: Architecture(model_type="qwen3", num_layers=28, hidden_size=1024, ffn_size=3072, num_heads=16,
                          num_kv_heads=8, head_size=128, vocab_size=151936, max_positions=40960, norm_eps=1e-6,
                          tied=True, qkv_bias=False, qk_norm=True, inv_freq=tensor of 64, rope_scale=1.0)
    """

    model_type: str
    max_positions: int
    norm_eps: float
    inv_freq: Tensor = field(compare=False, repr=False)
    """(head_size / 2,) float32: the rotary embedding's frequencies, with any scaling applied."""
    norm_expert_weights: bool = False
    """A token's chosen experts' probabilities are scaled to sum to 1."""
    rope_scale: float = 1.0
    """Cosine and sine are multiplied by it (yarn), which multiplies every attention score by its square."""
    adapters: AdapterShape | None = None
    """What is trained in place of the weights."""

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """From a transformers configuration. Raises UserError where this learner cannot compute the model exactly."""
        _check(config)
        shape = Shape.of(config)
        inv_freq, rope_scale = _rotary(config, shape.head_size)
        return cls(
            **vars(shape),
            model_type=config.model_type,
            max_positions=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            inv_freq=inv_freq,
            norm_expert_weights=shape.num_experts > 0 and config.norm_topk_prob,
            rope_scale=rope_scale,
        )

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_size


def _check(config: Any) -> None:
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"learner=megatron: model type {config.model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
        )
    if config.hidden_act != "silu":
        raise UserError(f"learner=megatron: hidden_act={config.hidden_act!r} is not supported; use a model with silu")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"learner=megatron: a model with {name}=true is not supported; use one without it")
    if config.model_type == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        raise UserError(
            "learner=megatron: a model with experts in some layers only (mlp_only_layers, decoder_sparse_step) is not "
            "supported; use one with experts in every layer"
        )


def _rotary(config: Any, head_size: int) -> tuple[Tensor, float]:
    """((head_size / 2,) float32 frequencies, the factor on cosine and sine), computed as transformers does."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if kind not in ("linear", "llama3", "yarn"):  # the others' frequencies depend on the longest position of a batch
        raise UserError(f"learner=megatron: rotary type {kind!r} is not supported; use default, linear, llama3 or yarn")
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config)
    return inv_freq.float(), float(scale)
