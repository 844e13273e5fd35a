"""How a model is cut over processes, and which cuts are possible: pure arithmetic, done before anything loads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.weight_map import LINEARS
from fastgrpo.models.stages import stages_of

NUM_SUGGESTIONS = 3
GROUPED_MULTIPLE = 8
"""Of the columns in a grouped product's matrices, whose rows must lie at multiples of 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes a user chooses; data parallelism takes the ranks that are left.

    Example: Layout(tp=2, pp=2) on 8 processes trains 2 data-parallel copies of a model cut over 4 ranks each.
    """

    tp: int = 1
    """Tensor parallel: every matrix, and the vocabulary, is cut over this many ranks."""
    pp: int = 1
    """Pipeline parallel: stages of consecutive layers."""
    vpp: int = 1
    """Virtual stages on each pipeline rank (interleaved schedule); 1 is the plain 1F1B schedule."""
    sp: bool = False
    """Sequence parallel: norms and residuals are cut along the tokens over the tp ranks."""
    cp: int = 1
    """Context parallel: a micro-batch's rows are cut over this many ranks, which gather keys and values to attend."""
    ep: int = 1
    """Expert parallel: a layer's experts are dealt over this many of a stage's ranks, whole. They are the ranks of
    tensor and data parallelism, so it takes no further ones. At 1, experts are cut over tp as other matrices are."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each (virtual) stage, in the model's order; None deals them out by time."""

    @property
    def num_model_ranks(self) -> int:
        """Ranks that compute a micro-batch together: they hold the model, cp times over."""
        return self.tp * self.cp * self.pp

    @property
    def expert_tp(self) -> int:
        """Ranks over which one expert's matrices are cut: as vLLM does with its expert parallelism off and on."""
        return self.tp if self.ep == 1 else 1

    def stages(self, architecture: Architecture) -> tuple[int, ...]:
        """The layers of each (virtual) stage, in the model's order."""
        return stages_of(architecture, self.pp * self.vpp, self.stage_layers)

    def __str__(self) -> str:
        parts = [f"tp={self.tp}", f"pp={self.pp}"]
        parts += [f"vpp={self.vpp}"] if self.vpp > 1 else []
        parts += [f"stage_layers={list(self.stage_layers)}".replace(" ", "")] if self.stage_layers else []
        parts += ["sp=true"] if self.sp else []
        parts += [f"cp={self.cp}"] if self.cp > 1 else []
        parts += [f"ep={self.ep}"] if self.ep > 1 else []
        return " ".join(parts)


def data_parallel_size(layout: Layout, architecture: Architecture, world_size: int) -> int:
    """How many copies of the model world_size processes hold.

    Raises UserError, naming the key, the reason and the nearest possible layouts, where the layout is impossible.
    """
    problem = _problem(layout, architecture, world_size)
    if problem is not None:
        raise UserError(f"{problem}; {_suggest(layout, architecture, world_size)}")
    return world_size // layout.num_model_ranks


def _problem(layout: Layout, architecture: Architecture, world_size: int) -> str | None:
    """What makes the layout impossible, or None."""
    for name in ("tp", "pp", "vpp", "cp", "ep"):
        if getattr(layout, name) < 1:
            return f"learner.{name}={getattr(layout, name)}: must be at least 1"
    return (
        _contradiction(layout)
        or _misfit(layout, architecture)
        or _expert_misfit(layout, architecture)
        or _wrong_world(layout, world_size)
    )


def _contradiction(layout: Layout) -> str | None:
    if layout.sp and layout.tp == 1:
        return "learner.sp=true: sequence parallelism cuts tokens over tensor-parallel ranks, and learner.tp=1"
    if layout.vpp > 1 and layout.pp == 1:
        return f"learner.vpp={layout.vpp}: virtual stages need a pipeline, and learner.pp=1"
    return None


def _misfit(layout: Layout, architecture: Architecture) -> str | None:
    tp, heads, kv_heads = layout.tp, architecture.num_heads, architecture.num_kv_heads
    if heads % tp:
        return f"learner.tp={tp}: does not divide the model's {heads} attention heads"
    if kv_heads % tp and tp % kv_heads:
        return f"learner.tp={tp}: the model's {kv_heads} key/value heads can be neither cut nor replicated {tp} ways"
    if tp > kv_heads and architecture.adapters is not None:
        qkv = LINEARS["self_attention.linear_qkv"]
        targets = [name for name in qkv if name in architecture.adapters.targets]
        if targets not in ([], list(qkv)):
            return (
                f"learner.tp={tp}: beyond the model's {kv_heads} key/value heads, model.lora.target_modules needs all "
                "of q_proj, k_proj and v_proj, or none"
            )
    if not architecture.num_experts and architecture.ffn_size % tp:
        return f"learner.tp={tp}: does not divide the model's feed-forward size {architecture.ffn_size}"
    return _stage_misfit(layout, architecture)


def _stage_misfit(layout: Layout, architecture: Architecture) -> str | None:
    num_stages, num_layers, asked = layout.pp * layout.vpp, architecture.num_layers, layout.stage_layers
    name = f"learner.pp={layout.pp}" + (f" x learner.vpp={layout.vpp}" if layout.vpp > 1 else "")
    if num_stages > num_layers:
        return f"{name}: more stages than the model's {num_layers} layers"
    if asked is not None and (len(asked) != num_stages or sum(asked) != num_layers or min(asked) < 1):
        return (
            f"learner.stage_layers={list(asked)}: {name} takes {num_stages} numbers above 0 that add up to the model's "
            f"{num_layers} layers"
        )
    return None


def _expert_misfit(layout: Layout, architecture: Architecture) -> str | None:
    ep, tp, num_experts = layout.ep, layout.tp, architecture.num_experts
    if not num_experts:
        return f"learner.ep={ep}: the model has no experts; use 1" if ep > 1 else None
    if num_experts % ep:
        return f"learner.ep={ep}: does not divide the model's {num_experts} experts"
    if tp > 1 and not layout.sp:
        return (
            f"learner.tp={tp}: a model with experts deals tokens to them by sequence parallelism; add learner.sp=true"
        )
    size, left = architecture.ffn_size, architecture.ffn_size // layout.expert_tp
    if size % layout.expert_tp:
        return f"learner.tp={tp}: does not divide the feed-forward size {size} of an expert"
    if left % GROUPED_MULTIPLE:
        multiple = f"a grouped product wants a multiple of {GROUPED_MULTIPLE}"
        return f"learner.tp={tp}: leaves {left} of an expert's feed-forward size {size}, and {multiple}"
    return None


def _wrong_world(layout: Layout, world_size: int) -> str | None:
    if world_size % layout.num_model_ranks:
        sizes = [f"learner.{name}={getattr(layout, name)}" for name in ("tp", "pp")]
        sizes += [f"learner.cp={layout.cp}"] if layout.cp > 1 else []
        return (
            f"{' x '.join(sizes)} = {layout.num_model_ranks} ranks a model: does not divide the {world_size} processes "
            "of this run"
        )
    if world_size // layout.pp % layout.ep:
        return f"learner.ep={layout.ep}: does not divide the {world_size // layout.pp} processes of a pipeline stage"
    return None


def _suggest(layout: Layout, architecture: Architecture, world_size: int) -> str:
    nearest = sorted(_possible(layout, architecture, world_size), key=lambda other: _distance(layout, other))
    shown = ", ".join(f"[{other}]" for other in nearest[:NUM_SUGGESTIONS])
    return f"possible with {world_size} process{'es' if world_size > 1 else ''}: {shown}"


def _possible(layout: Layout, architecture: Architecture, world_size: int) -> Iterator[Layout]:
    """Every (tp, pp), with (cp, ep) where asked for, that works here, with as much of the rest as was asked for."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    eps = [ep for ep in sizes if architecture.num_experts % ep == 0] if architecture.num_experts else [1]
    cps = sizes if layout.cp > 1 else [1]
    for tp, pp, cp, ep in itertools.product(sizes, sizes, cps, eps if layout.ep > 1 else [1]):
        sp = tp > 1 and (layout.sp or architecture.num_experts > 0)
        for vpp in (max(1, layout.vpp) if pp > 1 else 1, 1):
            candidate = replace(layout, tp=tp, pp=pp, vpp=vpp, sp=sp, cp=cp, ep=ep, stage_layers=None)
            if _problem(candidate, architecture, world_size) is None:
                yield candidate
                break


def _distance(wanted: Layout, other: Layout) -> tuple[float, float, int]:
    """Ranks a model first (its memory), then how far each size is from the one asked for, in doublings."""
    return (
        abs(_log2(wanted.num_model_ranks) - _log2(other.num_model_ranks)),
        sum(abs(_log2(getattr(wanted, name)) - _log2(getattr(other, name))) for name in ("tp", "pp", "cp", "ep")),
        -other.tp,
    )


def _log2(size: int) -> float:
    return math.log2(max(size, 1))
