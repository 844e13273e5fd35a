"""Where every box of a Hugging Face checkpoint lies in a rank's Megatron parameters: arithmetic, no tensor is touched.

A parameter is a column of boxes, one below the other, each whole rows of it. Loading, gathering, checkpoints and
`MegatronLearner.weight_slices` all follow this one map, and a rank's fused parameters are in memory what vLLM's are:
[Q; K; V] of the rank's own heads (qkv_proj) and [gate; up] of its own features (gate_up_proj).

Letters: H hidden, F feed-forward size, A query heads, C key/value heads, D head size, E experts, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fastgrpo.learner.megatron.architecture import Architecture

EMBEDDING, HEAD, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {  # in a layer: what every tensor-parallel rank holds the whole of
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
LINEARS = {  # in a layer: what may have adapters beside it, and the Hugging Face matrices that it holds
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands among those over which a stage's matrices are cut. Example: Place(tp=2, tp_rank=1)."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    def all_like(self, name: str) -> list[Place]:
        """The places of the ranks over which a parameter is cut, in their order; they are one process group.

        Expert parallelism gives each rank whole experts. Without it, experts are cut as other matrices are.
        """
        if is_expert(name) and self.ep > 1:
            return [replace(self, ep_rank=rank) for rank in range(self.ep)]
        return [replace(self, tp_rank=rank) for rank in range(self.tp)]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box of a Hugging Face tensor and the rows of a rank's parameter that hold it.

    Example, the keys of rank 1 of tp=2 with A=4, C=2, D=8 and H=32, in its (32, 32) query/key/value parameter:
        Box(name="model.layers.0.self_attn.k_proj.weight", full_shape=(16, 32), start=(8, 0), shape=(8, 32), row=16)
    """

    name: str
    full_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    row: int = 0
    """The parameter's first row that belongs to the box."""
    num_padding_rows: int = 0
    """Rows of zeros that follow it in the parameter: entries of no vocabulary."""

    @property
    def is_whole(self) -> bool:
        return self.shape == self.full_shape

    def of(self, full: Tensor) -> Tensor:
        """The box as a view of the Hugging Face tensor."""
        return full[tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))]

    def within(self, param: Tensor) -> Tensor:
        """The box as a view of the rank's parameter."""
        return _as_rows(param)[self.row : self.row + self.shape[0]]

    def padding(self, param: Tensor) -> Tensor:
        """The rows of padding behind it, as a view of the rank's parameter."""
        end = self.row + self.shape[0]
        return _as_rows(param)[end : end + self.num_padding_rows]


def _as_rows(param: Tensor) -> Tensor:
    """Stacked experts (E, rows, columns) as rows of one matrix."""
    return param.flatten(0, 1) if param.ndim == 3 else param


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def is_adapter(name: str) -> bool:
    return ".lora." in name


def boxes_of(name: str, architecture: Architecture, place: Place) -> list[Box]:
    """What a parameter holds on one rank, by its Megatron name with layers numbered over the model."""
    tp, tp_rank = place.tp, place.tp_rank
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    if name == FINAL_NORM:
        return [_whole("model.norm.weight", hidden)]
    if name in (EMBEDDING, HEAD):
        return [_vocabulary(name, architecture, tp, tp_rank)]
    match = LAYER.fullmatch(name)
    assert match is not None, name
    prefix, part = f"model.layers.{match[1]}.", match[2]
    if part in _WHOLE:
        return [_whole(prefix + _WHOLE[part], architecture.head_size if "self_attention" in part else hidden)]
    if part == "self_attention.linear_proj.weight":
        return [_columns(f"{prefix}self_attn.o_proj.weight", hidden, architecture.query_size, tp, tp_rank)]
    if part == "mlp.linear_fc1.weight":
        names = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        return [_rows(name, ffn, hidden, tp, tp_rank, row=i * ffn // tp) for i, name in enumerate(names)]
    if part == "mlp.linear_fc2.weight":
        return [_columns(f"{prefix}mlp.down_proj.weight", hidden, ffn, tp, tp_rank)]
    if part == "mlp.router.weight":
        shape = (architecture.num_experts, hidden)
        return [Box(name=f"{prefix}mlp.gate.weight", full_shape=shape, start=(0, 0), shape=shape)]
    if is_expert(name):
        return _experts(prefix, part, architecture, place)
    if is_adapter(name):
        linear, _ = name.split(".lora.")
        return _adapters(prefix, part, architecture, boxes_of(f"{linear}.weight", architecture, place))
    assert part in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"), name
    kind = part.rsplit(".", 1)[1]
    return [
        Box(
            name=f"{prefix}self_attn.{'qkv'[which]}_proj.{kind}",
            full_shape=(total, hidden) if kind == "weight" else (total,),
            start=(start, 0) if kind == "weight" else (start,),
            shape=(size, hidden) if kind == "weight" else (size,),
            row=row,
        )
        for which, total, start, size, row in qkv_rows(architecture, tp, tp_rank)
    ]


def is_replicated(name: str, architecture: Architecture, place: Place) -> bool:
    """Whether every tensor-parallel rank holds the whole parameter."""
    places = place.all_like(name)
    return boxes_of(name, architecture, places[0]) == boxes_of(name, architecture, places[-1])


def qkv_rows(architecture: Architecture, tp: int, tp_rank: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(0 for queries, 1 for keys, 2 for values; rows of that tensor; first of them here; how many; row here).

    A rank holds [Q; K; V] of its own heads. Where there are more ranks than key/value heads, Megatron gathers the
    projections of a key/value head's ranks in every forward pass, so those hold equal cuts of the head's [Q; K; V].
    """
    totals = (architecture.query_size, architecture.kv_size, architecture.kv_size)
    num_groups = min(tp, architecture.num_kv_heads)
    ranks_a_group = tp // num_groups
    group, cut = divmod(tp_rank, ranks_a_group)
    first = cut * sum(totals) // tp  # of this rank's rows, counted from its group's first
    last = first + sum(totals) // tp
    begin = 0
    for which, total in enumerate(totals):
        rows = total // num_groups
        start, end = max(begin, first), min(begin + rows, last)
        if start < end:
            yield which, total, group * rows + start - begin, end - start, start - first
        begin += rows


def _whole(name: str, size: int) -> Box:
    return Box(name=name, full_shape=(size,), start=(0,), shape=(size,))


def _rows(name: str, rows: int, columns: int, tp: int, tp_rank: int, *, row: int = 0) -> Box:
    """A matrix that tensor parallelism cuts along its rows."""
    size = rows // tp
    return Box(name=name, full_shape=(rows, columns), start=(tp_rank * size, 0), shape=(size, columns), row=row)


def _columns(name: str, rows: int, columns: int, tp: int, tp_rank: int) -> Box:
    size = columns // tp
    return Box(name=name, full_shape=(rows, columns), start=(0, tp_rank * size), shape=(rows, size))


def _experts(prefix: str, part: str, architecture: Architecture, place: Place) -> list[Box]:
    """(E / ep, 2F, H) gates and ups, or (E / ep, H, F) downs, with F cut over tp where ep is 1: vLLM's w13 and w2."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    tp, tp_rank = (place.tp, place.tp_rank) if place.ep == 1 else (1, 0)
    num_local = architecture.num_experts // place.ep
    boxes = []
    for local in range(num_local):
        name = f"{prefix}mlp.experts.{place.ep_rank * num_local + local}"
        if part == "mlp.experts.down_proj":
            boxes.append(replace(_columns(f"{name}.down_proj.weight", hidden, ffn, tp, tp_rank), row=local * hidden))
            continue
        for i, kind in enumerate(("gate_proj", "up_proj")):
            row = (2 * local + i) * ffn // tp
            boxes.append(_rows(f"{name}.{kind}.weight", ffn, hidden, tp, tp_rank, row=row))
    return boxes


def _adapters(prefix: str, part: str, architecture: Architecture, weight: list[Box]) -> list[Box]:
    """(n r, columns) the A's, or (rows, r) the B's, of a linear's n matrices with adapters, of which `weight` are the
    boxes. A takes the linear's input, so that a rank has all of them, though it may hold no row of some."""
    assert architecture.adapters is not None
    rank, targets = architecture.adapters.rank, architecture.adapters.targets
    linear, kind = part.split(".lora.")
    if kind == "A":
        (_, first), (_, columns), (_, total) = weight[0].start, weight[0].shape, weight[0].full_shape
        names = [f"{prefix}{matrix}.lora_A.weight" for matrix in LINEARS[linear] if matrix in targets]
        return [
            Box(name=name, full_shape=(rank, total), start=(0, first), shape=(rank, columns), row=i * rank)
            for i, name in enumerate(names)
        ]
    boxes, row = [], 0
    for box in weight:
        if matrix_of(box.name) in targets:
            name = box.name.replace(".weight", ".lora_B.weight")
            (rows, _), (start, _), (total, _) = box.shape, box.start, box.full_shape
            boxes.append(Box(name=name, full_shape=(total, rank), start=(start, 0), shape=(rows, rank), row=row))
            row += rows
    return boxes


def matrix_of(name: str) -> str:
    """Which of its layer's matrices a tensor belongs to: model.layers.0.mlp.up_proj.lora_B.weight to mlp.up_proj."""
    return ".".join(name.split(".")[3:5])


def _vocabulary(name: str, architecture: Architecture, tp: int, tp_rank: int) -> Box:
    """(V, H) with zero rows behind it, which no token looks up and the loss head masks."""
    vocab, size = architecture.vocab_size, architecture.padded_vocab_size(tp) // tp
    start = min(tp_rank * size, vocab)
    rows = min(size, vocab - start)
    return Box(
        name="model.embed_tokens.weight" if name == EMBEDDING or architecture.tied else "lm_head.weight",
        full_shape=(vocab, architecture.hidden_size),
        start=(start, 0),
        shape=(rows, architecture.hidden_size),
        num_padding_rows=size - rows,
    )
