"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the matrices that tensor parallelism cuts.

Each of Megatron's linears is one or several of Hugging Face's matrices, and each of those has adapters of its own, as
PEFT has them: W + s B A. A column-parallel linear has the whole of A on every rank and the rank's rows of B, a
row-parallel one the rank's columns of A and the whole of B. So a rank merges what it holds by itself, and all that goes
between ranks is A x, which is r wide. Under sequence parallelism what is whole on every rank is applied to the rank's
own tokens; finalize_model_grads sums its gradient.

Letters: T rows, r rank, n matrices with adapters in one linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.architecture import AdapterShape, Architecture
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.weight_map import LINEARS, Box, Place, boxes_of, matrix_of
from fastgrpo.models.lora import Adapters

if TYPE_CHECKING:
    from fastgrpo.learner.megatron.convert import Read


class LowRank(nn.Module):
    """The adapters of one linear, and its weight with them merged.

    A (n r, columns) and B (rows, r) hold a matrix's below another's, as the weight does. They, their gradients and
    moments are float32; products are in the model's type.
    """

    merged: Tensor | None
    """W + s B A, like the weight, where it is kept."""

    def __init__(
        self,
        linear: ColumnParallelLinear | RowParallelLinear,
        name: str,
        architecture: Architecture,
        place: Place,
        *,
        keep_merged: bool,
    ) -> None:
        super().__init__()
        assert architecture.adapters is not None
        rank, self.scale = architecture.adapters.rank, architecture.adapters.scale
        self.is_cut_by_rows = isinstance(linear, ColumnParallelLinear)
        self.sequence_parallel = linear.config.sequence_parallel
        self.enabled = True
        weight, a, b = (boxes_of(f"{name}.{kind}", architecture, place) for kind in ("weight", "lora.A", "lora.B"))
        a_rows, b_rows = ({matrix_of(box.name): _rows(box) for box in boxes} for boxes in (a, b))
        self.parts = [
            (_rows(box), (a_rows[matrix], b_rows[matrix]) if (matrix := matrix_of(box.name)) in b_rows else None)
            for box in weight
        ]
        """Rows of the linear's output, and the rows of A and of B that are for them; None without adapters."""
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(sum(box.shape[0] for box in a), linear.weight.shape[1], device=device))
        self.B = nn.Parameter(torch.empty(sum(box.shape[0] for box in b), rank, device=device))
        merged = torch.empty_like(linear.weight.detach()) if keep_merged else None
        self.register_buffer("merged", merged, persistent=False)
        cut, whole = (self.B, self.A) if self.is_cut_by_rows else (self.A, self.B)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=0 if self.is_cut_by_rows else 1, stride=1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x, the linear's input, and out, its output (T, 1, rows) -> out + s B A x."""
        low = self._whole(F.linear(x, self.A.to(x.dtype)))  # (T, 1, n r)
        wide = self.B.to(x.dtype)
        deltas = [
            out.new_zeros(*out.shape[:-1], rows.stop - rows.start)
            if pair is None
            else F.linear(low[..., pair[0]], wide[pair[1]])
            for rows, pair in self.parts
        ]
        return torch.add(out, torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0], alpha=self.scale)

    def _whole(self, low: Tensor) -> Tensor:
        """A x of all the rows and columns that B is for, from what this rank has of it."""
        if self.is_cut_by_rows:  # backward sums over the ranks, each of which has a part of B
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
            return copy_to_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low)
        return reduce_from_tensor_model_parallel_region(low)

    @torch.no_grad()
    def merge_into(self, merged: Tensor, weight: Tensor) -> Tensor:
        """merged = weight + s B A, in place."""
        merged.copy_(weight)
        for rows, pair in self.parts:
            if pair is not None:
                merged[rows].add_(self.B[pair[1]] @ self.A[pair[0]], alpha=self.scale)
        return merged


def _rows(box: Box) -> slice:
    return slice(box.row, box.row + box.shape[0])


def add_adapters(chunk: HiddenStatesModel, place: Place, *, keep_merged: bool) -> None:
    """Freeze the model, and put what its architecture says beside its linears, with values that are not initialised."""
    architecture = chunk.architecture
    assert architecture.adapters is not None
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for path, matrices in LINEARS.items():
            if not set(matrices).isdisjoint(architecture.adapters.targets):
                linear = layer.get_submodule(path)
                name = f"decoder.layers.{layer.layer_number - 1}.{path}"
                linear.lora = LowRank(linear, name, architecture, place, keep_merged=keep_merged)
                linear.register_forward_hook(_adapted)
    if chunk.pre_process and chunk.config.recompute_granularity is not None:
        # Else a recomputed part would have no input with a gradient, and its adapters would get none either.
        chunk.embedding.register_forward_hook(lambda _module, _args, embedded: embedded.requires_grad_())


def _adapted(linear: Any, args: tuple[Tensor], outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    out, bias = outputs
    return (linear.lora(args[0], out) if linear.lora.enabled else out), bias


def _linears(chunks: Iterable[nn.Module]) -> Iterator[Any]:
    """Those that have adapters."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return (module for module in modules if isinstance(getattr(module, "lora", None), LowRank))


@contextmanager
def disabled(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """The model computes as the base does."""
    linears = list(_linears(chunks))
    try:
        for linear in linears:
            linear.lora.enabled = False
        yield
    finally:
        for linear in linears:
            linear.lora.enabled = True


def merge(chunks: Iterable[nn.Module]) -> None:
    """Bring the merged weights up to date, where they are kept."""
    for linear in _linears(chunks):
        if linear.lora.merged is not None:
            linear.lora.merge_into(linear.lora.merged, linear.weight)


def kept_merged(chunks: Iterable[nn.Module]) -> dict[int, Tensor]:
    """The merged weights that are kept, by the ids of those whose place they take."""
    return {id(linear.weight): linear.lora.merged for linear in _linears(chunks) if linear.lora.merged is not None}


def merged_weights(chunks: Iterable[nn.Module]) -> Callable[[nn.Parameter], Tensor]:
    """A parameter to what the policy without adapters would have in its place, merged now where it is not kept."""
    linears = {id(linear.weight): linear for linear in _linears(chunks)}

    def of(param: nn.Parameter) -> Tensor:
        linear = linears.get(id(param))
        if linear is None:
            return param
        kept = linear.lora.merged
        return kept if kept is not None else linear.lora.merge_into(torch.empty_like(param), param)

    return of


def reading(adapters: Adapters, read: Read) -> Read:
    """Read the adapters, and all else with read."""
    tensors = dict(adapters.named())
    return lambda name: tensors[name] if name in tensors else read(name)


def shape_of(adapters: Adapters, architecture: Architecture) -> AdapterShape:
    """What the adapters are. Raises UserError for those that this learner cannot train just as PEFT would."""
    modules = list(adapters.modules())
    targets = tuple(matrix for matrix in _matrices() if any(path.endswith(f".{matrix}") for path, _ in modules))
    every = {f"model.layers.{i}.{matrix}" for i in range(architecture.num_layers) for matrix in targets}
    found = {(module.r["default"], module.scaling["default"]) for _, module in modules}
    trained = {f"{path}.lora_{kind}.weight" for path in every for kind in "AB"}
    config = adapters.config
    is_plain = not config.lora_dropout and config.init_lora_weights in (True, False, "gaussian")
    if not is_plain or len(found) != 1 or {name for name, _ in adapters.named()} != trained:
        raise UserError(
            f"model.lora: learner=megatron trains plain adapters of one rank, in every layer beside the same of "
            f"{', '.join(matrix.rpartition('.')[2] for matrix in _matrices())}; use others with learner=torch"
        )
    ((rank, scale),) = found
    return AdapterShape(rank=rank, scale=scale, targets=targets)


def _matrices() -> list[str]:
    return [matrix for matrices in LINEARS.values() for matrix in matrices]
