"""A layer's mixture of experts: Megatron's layer and token dispatcher, with our router's product and our experts.

A rank's experts are two stacked parameters, as in a transformers model's memory and as vLLM's w13 and w2, and each is
one grouped product, in torch. Megatron's own grouped experts want transformer-engine or the grouped_gemm package.

Letters: N rows dealt to this rank's experts, E experts here, H hidden, F feed-forward size of an expert (on this rank).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Router(TopKRouter):
    """Megatron's router, whose product without transformer-engine is an undefined name (megatron-core 0.16.1)."""

    def gating(self, input: Tensor) -> Tensor:
        """(T, 1, H) -> (T, 1, experts), in the model's dtype as in transformers and vLLM."""
        return F.linear(input, self.weight)


class Experts(nn.Module):
    """This rank's experts, built by Megatron's MoELayer."""

    def __init__(self, num_experts: int, config: TransformerConfig, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        ffn, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, ffn, **options))
        for param, axis in ((self.gate_up_proj, 1), (self.down_proj, 2)):
            # Megatron's marks: every rank holds another part; with ep > 1 fewer ranks hold the same.
            set_tensor_model_parallel_attributes(param, is_parallel=True, dim=axis, stride=1)
            param.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """(N, H) rows sorted by expert, (E,) how many each gets, (N,) the routers' weights -> (N, H), no bias."""
        ends = tokens_per_expert.to(rows.device).cumsum(0).int()
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        return (out * weights[:, None]).to(rows.dtype), None
