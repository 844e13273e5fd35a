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
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from fastgrpo.learner.expert_balance import ExpertBalance


class Router(TopKRouter):
    """Megatron's router, whose product without transformer-engine is an undefined name (megatron-core 0.16.1)."""

    balance: ExpertBalance | None = None
    """Watches the choices, where the model is trained."""
    row_weights: Tensor
    """(T,) of the rows that the layer is about to deal; see expert_balance.row_weights."""

    def gating(self, input: Tensor) -> Tensor:
        """(T, 1, H) -> (T, 1, experts), in the model's dtype as in transformers and vLLM."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, 1, experts) -> (T, experts) weights of the chosen experts, 0 elsewhere, and which are chosen."""
        assert padding_mask is None
        weights, chosen = super().routing(logits)
        if self.balance is not None:
            layer, rows = self.layer_number - 1, self.row_weights
            weights = self.balance.observe(layer, rows, logits.flatten(0, 1), chosen, weights)
        return weights, chosen


def watch(chunk: nn.Module, balance: ExpertBalance) -> None:
    """Let the balance observe every router of the model.

    A layer's call carries the row weights to its router in Megatron's argument for a padding mask, which is handed
    through every stage and recomputation and which a batch without padding does not need.
    """

    def hand_over(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        weights = kwargs["padding_mask"][0]
        if layer.config.sequence_parallel:
            weights = weights.chunk(layer.tp_group.size())[layer.tp_group.rank()]
        layer.router.row_weights = weights
        return args, {**kwargs, "padding_mask": None}

    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.router.balance = balance
            module.register_forward_pre_hook(hand_over, with_kwargs=True)


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
