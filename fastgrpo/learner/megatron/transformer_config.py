"""A model and its layout in Megatron's words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.layout import Layout

# By learner.activation_checkpoint.
RECOMPUTED: dict[str, dict[str, Any]] = {
    "none": {},
    # Not attention, whose cost grows with the length while a fused one keeps little; nor norms, which Megatron can
    # recompute only where transformer-engine is installed.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    architecture: Architecture, layout: Layout, *, dtype: torch.dtype, activation_checkpoint: str
) -> TransformerConfig:
    """What Megatron's modules, schedules and optimizers read. activation_checkpoint: a key of RECOMPUTED."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_size,
        # Cosine and sine times a factor are scores times its square.
        softmax_scale=architecture.rope_scale**2 * architecture.head_size**-0.5,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=_stages(layout.stages(architecture)) if layout.pp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Micro-batches differ in length. Megatron then wants this dispatcher, for dense models too.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The interleaved schedule computes wrong activations with its default, batched sends.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Token weights are global, so losses and gradients are sums: with this flag neither the schedule (by
        # micro-batches) nor DDP (by ranks) divides, and _finalize leaves out the division by the token count.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize,
        # These want transformer-engine or apex.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **RECOMPUTED[activation_checkpoint],
        **_expert_config(architecture, layout),
    )


def _stages(num_layers: tuple[int, ...]) -> list[list[str]]:
    """What is on each stage, in Megatron's words."""
    stages = [["decoder"] * count for count in num_layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _expert_config(architecture: Architecture, layout: Layout) -> dict[str, Any]:
    if not architecture.num_experts:
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.ffn_size,
        # Softmax over all experts before the choice, or over the chosen ones: the same as scaling them to sum to 1.
        "moe_router_pre_softmax": not architecture.norm_expert_weights,
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _finalize(chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Sum gradients over data parallelism, norms over tensor parallelism, tied embeddings over the pipeline's ends."""
    finalize_model_grads(chunks, None, **kwargs)


def _leave(weight: Tensor) -> Tensor:
    """Every weight is loaded, so initialising it would be wasted."""
    return weight
