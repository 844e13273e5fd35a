"""The policy's matrices side by side in memory, so that one product computes them and vLLM can adopt them as they are.

Hugging Face keeps a layer's query, key and value matrices apart, and gate and up too; vLLM fuses them by rows and pads
the vocabulary. `lay_out` gives the parameters memory of that shape: their names, shapes and values stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastgrpo.types import WeightSlice

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PRODUCTS = (*FUSED, ("o_proj",), ("down_proj",))
"""The matrices of a layer that are multiplied at once."""
VOCAB_MULTIPLE = 64
"""vLLM's own padding of the vocabulary; it also aligns the head's product."""


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Move the parameters' values into fused and padded memory; the parameters themselves stay."""
    for module in model.modules():
        for names in FUSED:
            parts = [getattr(module, name, None) for name in names]
            if not all(isinstance(part, nn.Linear) for part in parts):
                continue
            for kind in ("weight", "bias"):
                parameters = [getattr(part, kind) for part in parts]
                if parameters[0] is not None:
                    _fuse(parameters)
    for parameter in {id(p): p for p in _vocabulary(model)}.values():
        padded = parameter.new_zeros(parameter.shape[0] + _num_padding_rows(parameter), parameter.shape[1])
        padded[: parameter.shape[0]] = parameter
        parameter.data = padded[: parameter.shape[0]]


def _fuse(parameters: Sequence[nn.Parameter]) -> None:
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows


def _vocabulary(model: Any) -> list[nn.Parameter]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def _num_padding_rows(parameter: Tensor) -> int:
    return -parameter.shape[0] % VOCAB_MULTIPLE


def fused(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one after the other as one tensor over the same memory, or None where they do not."""
    first, *others = parts
    end = first.data_ptr() + first.nbytes
    for part in others:
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_memory or part.data_ptr() != end or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        end += part.nbytes
    if not first.is_contiguous():
        return None
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def weight_slices(model: nn.Module) -> list[WeightSlice]:
    """Every parameter under its name in a checkpoint, an adapter's in PEFT's; a tied head is its embedding, once."""
    padding = {id(p): _num_padding_rows(p) for p in _vocabulary(model)}
    return [
        WeightSlice(
            name=checkpoint_name,
            full_shape=tuple(tensor.shape),
            start=(0,) * tensor.ndim,
            tensor=tensor,
            num_padding_rows=padding.get(id(parameter), 0),
        )
        for name, parameter in model.named_parameters()
        for checkpoint_name, tensor in as_saved(without_peft(name), parameter.detach())
    ]


def without_peft(name: str) -> str:
    """A tensor's name without what PEFT puts in between: its wrapper of a matrix, its name of a set of adapters."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def as_saved(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A model's tensor under its name or names in a checkpoint, where experts are not stacked."""
    stem, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        for number, expert in enumerate(tensor):
            gate, up = expert.chunk(2)
            yield f"{stem}.experts.{number}.gate_proj.weight", gate
            yield f"{stem}.experts.{number}.up_proj.weight", up
    elif kind == "down_proj":
        for number, expert in enumerate(tensor):
            yield f"{stem}.experts.{number}.down_proj.weight", expert
    else:
        yield name, tensor


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, *grad.split(ctx.sizes)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts one under the other; nothing is copied where they lie so in memory, and the gradient goes to them."""
    if len(parts) == 1:
        return parts[0]
    whole = fused(parts)
    return torch.cat(tuple(parts)) if whole is None else _Join.apply(whole, *parts)
