"""Hugging Face's tensors to this rank's Megatron parameters and back, one at a time, bit for bit.

Both directions follow weight_map.py and stream: never more than one parameter's worth of full tensors exists beside
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgrpo.learner.megatron import lora
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.learner.megatron.weight_map import HEAD, LAYER, Box, boxes_of, is_adapter, is_expert, is_replicated
from fastgrpo.types import WeightSlice

Read = Callable[[str], Tensor]
"""A Hugging Face name to its full tensor."""


def parameters(chunks: Iterable[HiddenStatesModel]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, their layers numbered over the whole model."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            match = LAYER.fullmatch(name)
            if match is not None:
                layer = chunk.decoder.layers[int(match[1])]
                name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
            yield name, param


@torch.no_grad()
def load(chunks: list[HiddenStatesModel], read: Read, parallel: Parallel) -> None:
    """Fill every parameter of this rank; only tensors held here are read."""
    for name, param in parameters(chunks):
        for box in boxes_of(name, chunks[0].architecture, parallel.place):
            box.within(param).copy_(box.of(read(box.name)))
            box.padding(param).zero_()


def slices(chunks: list[HiddenStatesModel], parallel: Parallel) -> list[WeightSlice]:
    """What this rank holds of the policy, as views of live memory: its parameters, or merged weights in place of those
    with adapters where these are kept. A tied head is its embedding, on the first stage alone."""
    merged = lora.kept_merged(chunks)
    return [
        WeightSlice(
            name=box.name,
            full_shape=box.full_shape,
            start=box.start,
            tensor=box.within(merged.get(id(param), param.detach())),
            num_padding_rows=box.num_padding_rows,
        )
        for name, param in _once(chunks, parallel)
        if not (merged and is_adapter(name))
        for box in boxes_of(name, chunks[0].architecture, parallel.place)
    ]


@torch.no_grad()
def to_hf(
    chunks: list[HiddenStatesModel],
    parallel: Parallel,
    value: Callable[[nn.Parameter], Tensor] | None = None,
    *,
    adapters: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Every full tensor of the whole model under its Hugging Face name, on every rank of the model, in one order.

    value: what to take of each parameter, shaped like it (its gradient, for example); by default the parameter itself,
    or the merged weight where it has adapters. adapters: take those, and nothing else.
    The tensors may be views of the parameters: copy what must outlive the next update.
    All ranks of a model, and all that share its experts, must go through the iterator together, to its end: each step
    is collective.
    """
    value = value or lora.merged_weights(chunks)
    taken = ((name, param) for name, param in _once(chunks, parallel) if is_adapter(name) == adapters)
    held = {name: value(param).detach() for name, param in taken}
    architecture, place = chunks[0].architecture, parallel.place
    for name, owner, shape, dtype in _owners(held, parallel):
        shard = held.get(name)
        if shard is None:
            shard = torch.empty(shape, dtype=dtype, device=chunks[0].inv_freq.device)
        if parallel.layout.pp > 1:
            shard = shard.contiguous()
            dist.broadcast(shard, src=owner, group=parallel.pp_group)
        if is_replicated(name, architecture, place):
            yield from _assemble([shard], [boxes_of(name, architecture, place)])
        else:
            boxes = [boxes_of(name, architecture, there) for there in place.all_like(name)]
            yield from _assemble(_gather(name, shard, parallel), boxes)


def _once(chunks: list[HiddenStatesModel], parallel: Parallel) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, without the last stage's copy of a tied embedding."""
    for name, param in parameters(chunks):
        if not (name == HEAD and chunks[0].architecture.tied and parallel.layout.pp > 1):
            yield name, param


def _owners(held: dict[str, Tensor], parallel: Parallel) -> list[tuple[str, int, torch.Size, torch.dtype]]:
    """(name, global rank, shard's shape, dtype) of every parameter of the pipeline, in one order on all its ranks."""
    mine = [(name, dist.get_rank(), tensor.shape, tensor.dtype) for name, tensor in held.items()]
    if parallel.layout.pp == 1:
        return mine
    gathered: list[list[tuple[str, int, torch.Size, torch.dtype]]] = [[] for _ in range(parallel.layout.pp)]
    dist.all_gather_object(gathered, mine, group=parallel.pp_group)
    return [entry for stage in gathered for entry in stage]


def _gather(name: str, shard: Tensor, parallel: Parallel) -> list[Tensor]:
    """The shards of all ranks over which a parameter is cut."""
    group = parallel.ep_group if is_expert(name) and parallel.layout.ep > 1 else parallel.tp_group
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _assemble(shards: list[Tensor], boxes: list[list[Box]]) -> Iterator[tuple[str, Tensor]]:
    """The full tensors of a parameter from its ranks' shards and what each holds."""
    full: dict[str, Tensor] = {}
    for shard, held in zip(shards, boxes, strict=True):
        for box in held:
            if box.is_whole:
                full[box.name] = box.within(shard)
                continue
            if box.name not in full:
                full[box.name] = shard.new_empty(box.full_shape)
            box.of(full[box.name]).copy_(box.within(shard))
    yield from full.items()
