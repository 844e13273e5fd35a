"""A layer's mixture of experts: Megatron's layer and token dispatcher, with our router's product and our experts.

A rank's experts are two stacked parameters, as in a transformers model's memory and as vLLM's w13 and w2, and each is
one grouped product, in torch. Megatron's own grouped experts want transformer-engine or the grouped_gemm package.

Letters: N rows dealt to this rank's experts, E experts here, H hidden, F feed-forward size of an expert (on this rank),
L layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from fastgrpo.kernels.swiglu import swiglu
from fastgrpo.learner.expert_balance import ExpertBalance, refuse_without_experts
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.models.experts import choice_dtype

WEIGHT_BYTES = 4


class Router(TopKRouter):
    """Megatron's router, whose product without transformer-engine is an undefined name (megatron-core 0.16.1)."""

    balance: ExpertBalance | None = None
    """Watches the choices."""
    router_replay: Any
    """What Megatron asks for a choice before it makes one, unless None."""

    def gating(self, input: Tensor) -> Tensor:
        """(T, 1, H) -> (T, 1, experts), in the model's dtype as in transformers and vLLM."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, 1, experts) -> (T, experts) weights of the chosen experts, 0 elsewhere, and which are chosen.

        padding_mask: (T, 1, bytes), for_routers', of all the tokens that sequence parallelism cuts.
        """
        assert padding_mask is not None
        if self.config.sequence_parallel:
            padding_mask = padding_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        notes = padding_mask[:, 0].view(torch.uint8)
        given, own = self._given(notes), None
        if given is not None:
            with torch.no_grad():
                own = super().routing(logits)[1]
            self.router_replay = _Given(given)
        weights, chosen = super().routing(logits)
        self.router_replay = None
        if self.balance is None:
            return weights, chosen
        rows = notes[:, :WEIGHT_BYTES].contiguous().view(torch.float32)[:, 0]  # (T,)
        weights = self.balance.observe(self.layer_number - 1, rows, logits.flatten(0, 1), chosen, weights, own)
        return weights, chosen

    def _given(self, notes: Tensor) -> Tensor | None:
        """(T, k) the experts that the rows are to be sent to by this layer, or None where it chooses."""
        if notes.shape[1] == WEIGHT_BYTES:
            return None
        dtype = choice_dtype(self.config.num_moe_experts)
        size = self.topk * dtype.itemsize
        start = WEIGHT_BYTES + (self.layer_number - 1) * size
        return notes[:, start : start + size].contiguous().view(dtype).long()


class _Given:
    """For one call in place of Megatron's RouterReplay, which is a list of the process and holds one micro-batch."""

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts

    def get_replay_topk(self, scores: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return scores.gather(1, self.experts), self.experts


def watch_routers(
    chunks: Iterable[nn.Module], architecture: Architecture, coef: float, device: torch.device
) -> ExpertBalance | None:
    """What the chunks' routers tell of their choices, or None for a dense model.

    Raises UserError where a dense model is to balance its experts.
    """
    if not architecture.num_experts:
        refuse_without_experts(coef)
        return None
    sizes = (architecture.num_layers, architecture.num_experts, architecture.experts_per_token)
    balance = ExpertBalance(*sizes, coef=coef, device=device)
    for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)):
        router.balance = balance
    return balance


def for_routers(row_weights: Tensor, routed_experts: Tensor | None) -> Tensor:
    """(T,) of expert_balance.row_weights and (T, L, k) of PackedBatch -> (1, T, bytes), to be passed as padding mask.

    It is the one argument that Megatron hands to its routers, through stages and recomputations; there is no padding to
    mask. It has to be bool, so the bytes go by that name, and nobody but the routers looks into them.
    """
    parts = [row_weights[:, None].float(), *([] if routed_experts is None else [routed_experts.flatten(1)])]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1).view(torch.bool)[None]


class _ZeroWhereEmpty(torch.autograd.Function):
    """The weights (E, ...) as they are, and a gradient of zero for the experts that got none of `sizes` (E,)."""

    @staticmethod
    def forward(ctx, weights: Tensor, sizes: Tensor) -> Tensor:
        ctx.save_for_backward(sizes)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (sizes,) = ctx.saved_tensors
        return grad.masked_fill((sizes == 0)[:, None, None], 0.0), None


class Experts(nn.Module):
    """This rank's experts, built by Megatron's MoELayer."""

    def __init__(self, num_experts: int, config: TransformerConfig, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        assert config.moe_ffn_hidden_size is not None
        ffn, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        # Blackwell's grouped product leaves noise in the gradient of an expert without rows (pytorch issue 172439).
        self.clears_empty = device is not None and torch.cuda.get_device_capability(device)[0] >= 10
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, ffn, **options))
        for param, axis in ((self.gate_up_proj, 1), (self.down_proj, 2)):
            # Megatron's marks: every rank holds another part; with ep > 1 fewer ranks hold the same.
            set_tensor_model_parallel_attributes(param, is_parallel=True, dim=axis, stride=1)
            param.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """(N, H) rows sorted by expert, (E,) how many each gets, (N,) the routers' weights -> (N, H), no bias."""
        sizes, gate_up, down = tokens_per_expert.to(rows.device), self.gate_up_proj, self.down_proj
        if self.clears_empty:
            gate_up, down = (_ZeroWhereEmpty.apply(weights, sizes) for weights in (gate_up, down))
        ends = sizes.cumsum(0).int()
        inner = swiglu(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))  # (N, F)
        out = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        return (out * weights[:, None]).to(rows.dtype), None
