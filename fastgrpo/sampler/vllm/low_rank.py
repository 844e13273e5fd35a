"""Adapters beside vLLM's matrices: W x + s B A x, where A and B are parameters like any other.

vLLM's own LoRA reads adapters from files and looks up, for every token, which of many it has. Here all tokens have the
same, whose values change with every update, so they are two plain products a matrix, compiled and captured with the
rest. A rank adds its part before vLLM sums over the ranks, so adapters bring no collective of their own: beside a
matrix cut by rows a rank has the whole of A and its rows of B, beside one cut by columns its columns of A and all of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase

from fastgrpo.types import WeightSlice

Shapes = Mapping[str, tuple[int, float]]
"""The path of a checkpoint's matrix to its adapters' rank and scale: {"model.layers.0.self_attn.q_proj": (16, 2.0)}."""


class ServedAdapters(nn.Module):
    """The adapters of what one of vLLM's linears holds.

    matrices: the boxes of the checkpoint's matrices that lie one below another in the linear's weight. The A's lie so
    too, (sum of the ranks, columns), and each matrix's B is a parameter of its own, (rows, rank), because ranks differ.
    """

    def __init__(self, matrices: list[WeightSlice], shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        self._held: dict[str, list[WeightSlice]] = {"A": []}
        self._parts: list[tuple[str, slice, slice, float]] = []
        """Of each matrix with adapters: its B's name, its rows of the output, its rows of A, its scale."""
        row = low = 0
        for number, matrix in enumerate(matrices):
            path, (rows, columns) = matrix.name.removesuffix(".weight"), matrix.tensor.shape
            if path in shapes:
                rank, scale = shapes[path]
                (all_rows, all_columns), (first_row, first_column) = matrix.full_shape, matrix.start
                a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rank, columns), (rows, rank)))
                kind = f"B{number}"
                self._held["A"].append(_box(f"{path}.lora_A.weight", (rank, all_columns), (0, first_column), a))
                self._held[kind] = [_box(f"{path}.lora_B.weight", (all_rows, rank), (first_row, 0), b)]
                self.register_parameter(kind, nn.Parameter(b, requires_grad=False))
                self._parts.append((kind, slice(row, row + rows), slice(low, low + rank), scale))
                low += rank
            row += rows
        self.A = nn.Parameter(torch.empty(low, columns, dtype=dtype, device="meta"), requires_grad=False)

    def slices(self, kind: str, memory: Tensor) -> Iterator[WeightSlice]:
        """What a parameter holds, as views of `memory`, which has its shape."""
        row = 0
        for box in self._held[kind]:
            rows = len(box.tensor)
            yield _box(box.name, box.full_shape, box.start, memory[row : row + rows])
            row += rows

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x (..., columns), out = W x (..., rows) -> out + s B A x, in place."""
        low = F.linear(x, self.A)
        for kind, rows, lows, scale in self._parts:
            out[..., rows].add_(F.linear(low[..., lows], getattr(self, kind)), alpha=scale)
        return out


class AdaptedLinear:
    """What vLLM asks for a linear's product, with the adapters' on top."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.lora(x, self._method.apply(layer, x, bias))


def add_adapters(linears: Mapping[LinearBase, list[WeightSlice]], shapes: Shapes) -> None:
    """Put the adapters of shapes, without memory yet, beside the linears that hold their matrices.

    linears: each with what its weight holds. Raises NotImplementedError where no linear holds one of the matrices.
    """
    held = {box.name.removesuffix(".weight") for boxes in linears.values() for box in boxes}
    if missing := sorted(shapes.keys() - held):
        raise NotImplementedError(f"it has no matrix {missing[0]} to put adapters beside")
    for linear, boxes in linears.items():
        if any(box.name.removesuffix(".weight") in shapes for box in boxes):
            linear.lora = ServedAdapters(boxes, shapes, linear.params_dtype)


def use_adapters(model: nn.Module) -> None:
    """From now on the linears compute with them."""
    for module in model.modules():
        if isinstance(getattr(module, "lora", None), ServedAdapters):
            module.quant_method = AdaptedLinear(module.quant_method)  # type: ignore[assignment]


def _box(name: str, full_shape: tuple[int, ...], start: tuple[int, ...], tensor: Tensor) -> WeightSlice:
    return WeightSlice(name=name, full_shape=full_shape, start=start, tensor=tensor)
