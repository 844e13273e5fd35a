"""Which boxes of a checkpoint's tensors a vLLM parameter holds, for whatever vLLM fuses, cuts and pads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from fastgrpo.sampler.vllm.low_rank import ServedAdapters
from fastgrpo.types import WeightSlice


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A parameter and every module that holds it: one, or two where the head is tied to the embedding."""

    name: str
    """vLLM's name, of the first of them."""
    owners: tuple[tuple[nn.Module, str], ...]
    parameter: nn.Parameter

    def slices(self, memory: Tensor) -> list[WeightSlice]:
        """What the parameter holds, as views of `memory`: its own, or any of its shape (a meta tensor's, say)."""
        module, kind = self.owners[0]
        stem, _, leaf = self.name.removesuffix(f".{kind}").rpartition(".")
        prefix = f"{stem}." if stem else ""
        return list(_slices(module, kind, prefix, leaf, memory))


def parameters(model: nn.Module) -> list[Owned]:
    """Every parameter of a vLLM model, once."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, kind))
            named.setdefault(id(parameter), (f"{path}.{kind}", parameter))
    return [
        Owned(name=name, owners=tuple(owners[key]), parameter=parameter) for key, (name, parameter) in named.items()
    ]


def _slices(module: nn.Module, kind: str, prefix: str, leaf: str, memory: Tensor) -> Iterator[WeightSlice]:
    if isinstance(module, ServedAdapters):
        yield from module.slices(kind, memory)
    elif isinstance(module, QKVParallelLinear):
        yield from _fused(_qkv(module), kind, prefix, memory)
    elif isinstance(module, MergedColumnParallelLinear):
        assert leaf == "gate_up_proj", leaf
        sizes, rank = module.output_partition_sizes, module.tp_rank
        blocks = zip(("gate_proj", "up_proj"), module.output_sizes, (rank * size for size in sizes), sizes, strict=True)
        yield from _fused(blocks, kind, prefix, memory)
    elif isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        held = shard.org_vocab_end_index - shard.org_vocab_start_index
        yield WeightSlice(
            name=f"{prefix}{leaf}.{kind}",
            full_shape=(module.org_vocab_size, *memory.shape[1:]),
            start=(shard.org_vocab_start_index, *(0 for _ in memory.shape[1:])),
            tensor=memory[:held],
            num_padding_rows=len(memory) - held,
        )
    elif isinstance(module, RowParallelLinear) and kind == "weight":
        columns = module.input_size_per_partition
        yield WeightSlice(
            name=f"{prefix}{leaf}.{kind}",
            full_shape=(len(memory), module.input_size),
            start=(0, module.tp_rank * columns),
            tensor=memory,
        )
    elif isinstance(module, RoutedExperts):
        yield from _experts(module, kind, prefix, memory)
    else:  # norms, and whatever every rank holds whole
        yield WeightSlice(
            name=f"{prefix}{leaf}.{kind}", full_shape=tuple(memory.shape), start=(0,) * memory.ndim, tensor=memory
        )


def _qkv(module: QKVParallelLinear) -> Iterator[tuple[str, int, int, int]]:
    """Ranks beyond the number of key/value heads hold copies of them."""
    size, kv_rank = module.head_size, module.tp_rank // module.num_kv_head_replicas
    yield "q_proj", module.total_num_heads * size, module.tp_rank * module.num_heads * size, module.num_heads * size
    for name in ("k_proj", "v_proj"):
        yield name, module.total_num_kv_heads * size, kv_rank * module.num_kv_heads * size, module.num_kv_heads * size


def _experts(module: RoutedExperts, kind: str, prefix: str, memory: Tensor) -> Iterator[WeightSlice]:
    """w13 (E, 2F, H) is every expert's gate above its up projection, w2 (E, H, F) its down projection; tensor
    parallelism cuts F, expert parallelism deals whole experts."""
    moe, place = module.moe_config, module.moe_config.moe_parallel_config
    size = module.intermediate_size_per_partition
    if kind not in ("w13_weight", "w2_weight") or moe.intermediate_size_per_partition_unpadded != size:
        raise NotImplementedError(f"{prefix}{kind} is padded, or more than a matrix, which fastgrpo cannot share yet")
    first, whole = place.tp_rank * size, place.tp_size * size
    for local, expert in enumerate(memory):
        stem = f"{prefix}{place.ep_rank * len(memory) + local}"
        if kind == "w13_weight":
            for name, rows in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                yield WeightSlice(
                    name=f"{stem}.{name}.weight", full_shape=(whole, rows.shape[1]), start=(first, 0), tensor=rows
                )
        else:
            yield WeightSlice(
                name=f"{stem}.down_proj.weight", full_shape=(len(expert), whole), start=(0, first), tensor=expert
            )


def _fused(blocks, kind: str, prefix: str, memory: Tensor) -> Iterator[WeightSlice]:
    """blocks: (name, rows of the whole tensor, first row held, rows held) of the tensors that lie one below another."""
    offset = 0
    for name, all_rows, first, rows in blocks:
        yield WeightSlice(
            name=f"{prefix}{name}.{kind}",
            full_shape=(all_rows, *memory.shape[1:]),
            start=(first, *(0 for _ in memory.shape[1:])),
            tensor=memory[offset : offset + rows],
        )
        offset += rows
    assert offset == len(memory), (prefix, kind, offset, tuple(memory.shape))
