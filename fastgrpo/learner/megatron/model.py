"""The model in Megatron's modules: its layers from a spec, with our norm and our packed attention, hidden states out.

Letters: T packed rows, H hidden, A query heads, C key/value heads, D head size (A, C per tensor-parallel rank).
Under sequence parallelism the residual stream holds T / tp rows on each rank; attention always sees all T.
Under context parallelism T is this rank's share of the packed rows everywhere, and only keys and values are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from fastgrpo.kernels.rms_norm import rms_norm
from fastgrpo.kernels.rotary import rotary
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.kernels.swiglu import swiglu
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.experts import Experts, Router
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.transformer_config import transformer_config


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Megatron's own needs transformer-engine or refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=_device()), requires_grad=True
        )
        # Each rank sees only its tokens then, so finalize_model_grads must sum the gradient over tensor parallelism.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass
class SegmentParams(PackedSeqParams):
    """Carries a batch's attention plan through Megatron's layers to SegmentAttention.

    qkv_format is left None: positions and segments are ours, so Megatron's handling of `thd` must not apply.
    """

    plan: SegmentPlan | None = None


class SegmentAttention(nn.Module):
    """The core attention over the segments of a PackedBatch, built by Megatron's SelfAttention."""

    def __init__(self, *, config: TransformerConfig, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, *, packed_seq_params, **_: Any) -> Tensor:
        """q (T, 1, A, D), k and v (T, 1, C, D), rotated -> (T, 1, A*D), of this rank's rows where cp cuts them."""
        if self.cp_group.size() > 1:  # backward reduce-scatters: every rank's queries have a share in the gradient
            k, v = (gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (k, v))
        out = segment_attention(q[:, 0], k[:, 0], v[:, 0], packed_seq_params.plan, scale=self.scale)
        return out.flatten(1)[:, None]


class FusedSelfAttention(SelfAttention):
    """SelfAttention whose projection is stored as a rank's [Q; K; V], as vLLM stores it (Megatron interleaves the three
    by key/value head), and whose queries and keys are normalised and rotated in one pass. With more ranks than
    key/value heads the projection and the norms are Megatron's own (weight_map.qkv_rows)."""

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple:
        """rotary_pos_emb: (2, T, 1, D), cosine and sine. Megatron hands what it takes for another sequence's states on
        to where the queries and keys are made, and rotates nothing itself."""
        return super().forward(hidden_states, *args, key_value_states=rotary_pos_emb, rotary_pos_emb=None, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: Tensor, key_value_states: Tensor, **kwargs: Any) -> tuple:
        """(T, 1, H), and (2, T, 1, D) to rotate by -> queries (T, 1, A, D), keys and values (T, 1, C, D)."""
        cos, sin = key_value_states
        normed: dict[str, Any] = {}
        if self.config.num_query_groups < self.world_size:
            parts = super().get_query_key_value_tensors(hidden_states, **kwargs)
            heads, kv_heads = parts[0].shape[2], 1
            qkv = torch.cat(parts, dim=2)[:, 0]
        else:
            heads, kv_heads = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
            qkv = self.linear_qkv(hidden_states)[0][:, 0].unflatten(-1, (heads + 2 * kv_heads, -1))  # (T, A + 2C, D)
            if self.q_layernorm is not None:
                norms = ((self.q_layernorm, heads), (self.k_layernorm, kv_heads))
                normed["weight"] = torch.cat([norm.weight.expand(count, -1) for norm, count in norms])  # (A + C, D)
                normed["epsilon"] = self.config.layernorm_epsilon
        return tuple(x[:, None] for x in rotary(qkv, cos, sin, heads, kv_heads, **normed))


class FeedForward(MLP):
    """MLP that keeps gate and up alone for its backward pass; Megatron's, unfused, keeps five such tensors, not three
    (silu(gate), and up plus an offset of 0)."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


class HiddenStatesModel(GPTModel):
    """GPTModel whose last stage returns the normalised hidden states: logits exist only inside the loss head."""

    def __init__(self, architecture: Architecture, config: TransformerConfig, **kwargs: Any) -> None:
        tp = config.tensor_model_parallel_size
        super().__init__(
            config=config,
            transformer_layer_spec=_block_spec(architecture, config, kwargs.get("vp_stage")),
            vocab_size=architecture.padded_vocab_size(tp),
            max_sequence_length=architecture.max_positions,
            position_embedding_type="none",
            share_embeddings_and_output_weights=architecture.tied,
            **kwargs,
        )
        self.architecture = architecture
        inv_freq = torch.cat([architecture.inv_freq, architecture.inv_freq])  # (D,)
        self.register_buffer("inv_freq", inv_freq.to(_device()), persistent=False)

    def _preprocess(self, *, position_ids: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple:
        """Megatron's, with each row's own position to rotate by: a completion's go on from its prompt's end.

        What stands for a padding mask (experts.for_routers) is left whole for every stage.
        """
        embedded, _, *rest, _ = super()._preprocess(position_ids=position_ids, **kwargs)
        angles = position_ids[0, :, None, None].float() * self.inv_freq  # (T, 1, D)
        rotation = torch.stack([angles.cos(), angles.sin()]).to(self.config.params_dtype)
        return embedded, rotation, *rest, padding_mask

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    @property
    def has_routers(self) -> bool:
        return self.architecture.num_experts > 0

    @property
    def head_weight(self) -> Tensor:
        """(V / tp, H): this rank's shard of the head; the embedding's where they are tied. Last stage only."""
        assert self.post_process
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build(
    architecture: Architecture, layout: Layout, *, dtype: torch.dtype, activation_checkpoint: str = "none"
) -> list[HiddenStatesModel]:
    """This rank's part of the model, a module per virtual stage, with weights that are not initialised.

    activation_checkpoint: none | selective | full, what the backward pass computes again (config.LearnerConfig).
    """
    config = transformer_config(architecture, layout, dtype=dtype, activation_checkpoint=activation_checkpoint)
    chunks = []
    for stage in range(layout.vpp):
        place = {"vp_stage": stage if layout.vpp > 1 else None, "ignore_virtual": layout.vpp == 1}
        chunk = HiddenStatesModel(
            architecture,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=place["vp_stage"],
        )
        chunks.append(chunk.to(_device()))  # Megatron makes the routers on the CPU
    return chunks


def _block_spec(
    architecture: Architecture, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SegmentAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm if architecture.qk_norm else None,
        k_layernorm=RMSNorm if architecture.qk_norm else None,
    )
    mlp: Any = FeedForward  # as a spec Megatron would say of every layer's that it does not know it
    if architecture.num_experts:
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=Experts, router=Router))
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=FusedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
