"""Hugging Face's tensors to this rank's Megatron parameters and back, one at a time, bit for bit.

Both directions stream: never more than one parameter's worth of full tensors exists beside the model. A parameter's
`fused` form is the whole of it, over all tensor-parallel ranks, in Megatron's order; a rank's shard is an equal slice
of that along one axis.

Letters: H hidden, F feed-forward size, A query heads, C key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.parallel import Parallel

Read = Callable[[str], Tensor]
"""A Hugging Face name to its full tensor."""

_EMBEDDING, _HEAD, _NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {  # in a layer: Megatron's name -> (Hugging Face's name, the axis that tensor parallelism cuts)
    "input_layernorm.weight": ("input_layernorm.weight", None),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", None),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", None),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", None),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face's tensors.

    Example: the query, key and value matrices of a layer fuse into one (C * (A/C + 2) * D, H), cut along axis 0.
    """

    hf_names: tuple[str, ...]
    axis: int | None
    """Of the fused form; None where every rank holds the whole."""
    fuse: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]
    unfuse: Callable[[Tensor], Iterable[Tensor]] = lambda fused: (fused,)
    fold: int = 1
    """A shard's axis 0 unfolds into (fold, ...): a rank holds a slice of the gate, then one of the up projection."""


def rule_for(name: str, architecture: Architecture, tp: int) -> Rule:
    """The rule of a parameter, by its Megatron name with the layer's number counted over the whole model."""
    if name == _NORM:
        return Rule(hf_names=("model.norm.weight",), axis=None)
    if name in (_EMBEDDING, _HEAD):
        hf_name = "model.embed_tokens.weight" if name == _EMBEDDING or architecture.tied else "lm_head.weight"
        return _vocabulary(hf_name, architecture, tp)
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    prefix, part = f"model.layers.{match[1]}.", match[2]
    if part in _WHOLE:
        hf_name, axis = _WHOLE[part]
        return Rule(hf_names=(prefix + hf_name,), axis=axis)
    if part == "mlp.linear_fc1.weight":
        names = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        return Rule(hf_names=names, axis=1, fuse=torch.stack, unfuse=torch.unbind, fold=2)  # (2, F, H)
    assert part in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"), name
    return _qkv(prefix, part.rsplit(".", 1)[1], architecture)


def _qkv(prefix: str, kind: str, architecture: Architecture) -> Rule:
    """Rows ordered by key/value head: its A/C query heads, its key, its value."""
    kv_heads, size = architecture.num_kv_heads, architecture.head_size
    rows = [architecture.num_heads // kv_heads * size, size, size]

    def fuse(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (kv_heads, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def unfuse(fused: Tensor) -> Iterator[Tensor]:
        for part in fused.unflatten(0, (kv_heads, -1)).split(rows, dim=1):
            yield part.flatten(0, 1)

    names = tuple(f"{prefix}self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return Rule(hf_names=names, axis=0, fuse=fuse, unfuse=unfuse)


def _vocabulary(hf_name: str, architecture: Architecture, tp: int) -> Rule:
    """(V, H) with zero rows behind it, which no token looks up and the loss head masks."""
    missing = architecture.padded_vocab_size(tp) - architecture.vocab_size

    def fuse(tensors: list[Tensor]) -> Tensor:
        return nn.functional.pad(tensors[0], (0, 0, 0, missing))

    return Rule(
        hf_names=(hf_name,), axis=0, fuse=fuse, unfuse=lambda fused: (fused[: architecture.vocab_size].contiguous(),)
    )


def parameters(chunks: Iterable[HiddenStatesModel]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, their layers numbered over the whole model."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            match = _LAYER.fullmatch(name)
            if match is not None:
                layer = chunk.decoder.layers[int(match[1])]
                name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
            yield name, param


def to_megatron(
    chunks: Iterable[HiddenStatesModel], read: Read, parallel: Parallel
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each of this rank's parameters with its shard, in the source's dtype; only tensors held here are read."""
    tp = parallel.layout.tp
    for chunk in chunks:
        for name, param in parameters([chunk]):
            rule = rule_for(name, chunk.architecture, tp)
            fused = rule.fuse([read(hf_name) for hf_name in rule.hf_names])
            shard = fused if rule.axis is None else fused.chunk(tp, rule.axis)[parallel.tp_rank]
            yield param, shard.reshape(param.shape)


@torch.no_grad()
def load(chunks: Iterable[HiddenStatesModel], read: Read, parallel: Parallel) -> None:
    """Fill every parameter of this rank."""
    for param, shard in to_megatron(chunks, read, parallel):
        param.copy_(shard)


@torch.no_grad()
def to_hf(
    chunks: list[HiddenStatesModel], parallel: Parallel, value: Callable[[nn.Parameter], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every full tensor of the whole model under its Hugging Face name, on every rank of the model, in one order.

    value: what to take of each parameter, shaped like it (its gradient, for example); the parameter itself by default.
    The tensors may be views of the parameters: copy what must outlive the next update.
    All ranks of a model must go through the iterator together, to its end: each step is collective.
    """
    held = {name: (param if value is None else value(param)).detach() for name, param in parameters(chunks)}
    architecture = chunks[0].architecture
    if architecture.tied and parallel.layout.pp > 1:
        held.pop(_HEAD, None)  # the last stage's copy of the embedding
    for name, owner, shape, dtype in _owners(held, parallel):
        shard = held.get(name)
        if shard is None:
            shard = torch.empty(shape, dtype=dtype, device=chunks[0].inv_freq.device)
        if parallel.layout.pp > 1:
            shard = shard.contiguous()
            dist.broadcast(shard, src=owner, group=parallel.pp_group)
        rule = rule_for(name, architecture, parallel.layout.tp)
        yield from zip(rule.hf_names, rule.unfuse(_unshard(shard, rule, parallel)), strict=True)


def _owners(held: dict[str, Tensor], parallel: Parallel) -> list[tuple[str, int, torch.Size, torch.dtype]]:
    """(name, global rank, shard's shape, dtype) of every parameter of the pipeline, in one order on all its ranks."""
    mine = [(name, dist.get_rank(), tensor.shape, tensor.dtype) for name, tensor in held.items()]
    if parallel.layout.pp == 1:
        return mine
    gathered: list[list[tuple[str, int, torch.Size, torch.dtype]]] = [[] for _ in range(parallel.layout.pp)]
    dist.all_gather_object(gathered, mine, group=parallel.pp_group)
    return [entry for stage in gathered for entry in stage]


def _unshard(shard: Tensor, rule: Rule, parallel: Parallel) -> Tensor:
    """A rank's shard to the fused form, gathered over tensor parallelism."""
    if rule.axis is None:
        return shard
    shards = [shard]
    if parallel.layout.tp > 1:
        shards = [torch.empty_like(shard) for _ in range(parallel.layout.tp)]
        dist.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    folded = [s.unflatten(0, (rule.fold, -1)) if rule.fold > 1 else s for s in shards]
    return folded[0] if len(folded) == 1 else torch.cat(folded, dim=rule.axis)
