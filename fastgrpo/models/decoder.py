"""The decoder of a Hugging Face model on that model's own parameters: rows in, hidden states out, attention handed in.

Qwen2, Qwen3, Llama and Mistral are one architecture with different options. Computing it here instead of in their
modules lets query, key and value be one product and gate and up another, and attention be whatever the caller needs:
packed training, prefill and decoding with a cache are three small objects. A module that is no plain matrix (an
adapter) or no SwiGLU (experts) is called as it is.

Letters: T rows, H hidden, A / C query / key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrpo.kernels.cpu_linear import CpuLinear, can_pack, linear, pack
from fastgrpo.kernels.rms_norm import add_norm, rms_norm
from fastgrpo.kernels.rotary import rotary
from fastgrpo.kernels.swiglu import swiglu
from fastgrpo.models.storage import join

CausalLM: TypeAlias = Any
"""A transformers model with .model, .lm_head, .config and .device, which its stubs do not tell."""
Projection: TypeAlias = Callable[[Tensor], Tensor]

PACKED_LIMIT = 256 << 20
"""Bytes of parameters up to which a decoder keeps packed copies: they are a second set of the weights."""


class Attend(Protocol):
    """What runs inside every attention layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (T, A, D), k and v (T, C, D), q and k rotated -> (T, A, D)."""
        ...


def project(layers: Sequence[Any], pack_for: int | None = None) -> Projection:
    """The layers' outputs side by side, (T, inputs) -> (T, sum of outputs): one product where all are plain.

    pack_for: multiply with packed copies, made for that many rows.
    """
    if not all(type(layer) in (nn.Linear, CpuLinear) for layer in layers):
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight = join([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else join([layer.bias for layer in layers])
    if pack_for is not None and can_pack(weight):
        weight = pack(weight, pack_for)
    return partial(linear, weight=weight, bias=bias)


class Layer:
    """One layer's parameters, ready to be multiplied with."""

    def __init__(self, module: Any, config: Any, project: Callable[[list[Any]], Projection]) -> None:
        self.module, attention, mlp = module, module.self_attn, module.mlp
        self.qkv = project([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = project([attention.o_proj])
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qk_norm: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            norms = ((attention.q_norm, self.num_heads), (attention.k_norm, self.num_kv_heads))
            self.qk_norm["weight"] = torch.cat([norm.weight.expand(heads, -1) for norm, heads in norms])  # (A + C, D)
            self.qk_norm["epsilon"] = attention.q_norm.variance_epsilon
        self.is_swiglu = hasattr(mlp, "gate_proj") and config.hidden_act == "silu"
        if self.is_swiglu:
            # One product on a GPU; on a CPU passes over the halves of its output cost more than a second one.
            on_cpu = mlp.gate_proj.weight.device.type == "cpu"
            inner = [[mlp.gate_proj], [mlp.up_proj]] if on_cpu else [[mlp.gate_proj, mlp.up_proj]]
            self.gate_and_up, self.down = [project(parts) for parts in inner], project([mlp.down_proj])

    def __call__(
        self, stream: Tensor, change: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """(T, H) residual stream and what the layer before adds to it -> the same after this layer."""
        stream, x = _add_norm(stream, change, self.module.input_layernorm)
        stream, x = _add_norm(stream, self._attention(x, cos, sin, attend), self.module.post_attention_layernorm)
        if not self.is_swiglu:
            return stream, self.module.mlp(x[None])[0]
        return stream, self.down(swiglu(*[product(x) for product in self.gate_and_up]))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        attention = self.module.self_attn
        qkv = self.qkv(x).unflatten(-1, (-1, attention.head_dim))  # (T, A + 2C, D)
        q, k, v = rotary(qkv, cos, sin, self.num_heads, self.num_kv_heads, **self.qk_norm)
        return self.out(attend(attention.layer_idx, q, k, v, attention.scaling).flatten(1))


def _add_norm(stream: Tensor, change: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    if change is None:
        return stream, rms_norm(stream, norm.weight, norm.variance_epsilon)
    return add_norm(stream, change, norm.weight, norm.variance_epsilon)


class Decoder:
    """A model's decoder and head, for one forward pass under autograd or for many while the parameters stand still.

    pack_for: rows of most calls that follow, all without gradients. Then a model on a CPU multiplies with packed
    copies of its matrices, if its parameters are no more than PACKED_LIMIT bytes.
    """

    def __init__(self, model: CausalLM, pack_for: int | None = None) -> None:
        if pack_for is not None and sum(p.nbytes for p in model.parameters()) > PACKED_LIMIT:
            pack_for = None
        make = partial(project, pack_for=pack_for)
        self.model = model.model
        self.layers = [Layer(module, model.config, make) for module in model.model.layers]
        self.logits = make([model.lm_head])
        """(T, H) -> (T, V)."""

    def hidden_states(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """The last layer's hidden states, normalised: (T,) token ids and positions -> (T, H)."""
        stream, change = self.model.embed_tokens(token_ids), None
        cos, sin = (x[0, :, None] for x in self.model.rotary_emb(stream, position_ids[None]))  # (T, 1, D)
        for layer in self.layers:
            if layer.module.gradient_checkpointing and layer.module.training and torch.is_grad_enabled():
                stream, change = checkpoint(layer, stream, change, cos, sin, attend, use_reentrant=False)
            else:
                stream, change = layer(stream, change, cos, sin, attend)
        return _add_norm(stream, change, self.model.norm)[1]


def hidden_states(model: CausalLM, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """See Decoder.hidden_states."""
    return Decoder(model).hidden_states(token_ids, position_ids, attend)


def recompute_activations(model: CausalLM) -> None:
    """From now on the backward pass computes every layer again, and of a layer only its input is kept."""
    for module in model.model.layers:
        module.gradient_checkpointing = True
