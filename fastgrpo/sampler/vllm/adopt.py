"""vLLM's parameters made of the learner's memory while vLLM loads: at no time are there two copies of a matrix.

A model loader, registered with vLLM, builds the model with its matrices on the meta device and then gives each
parameter the learner's tensors, as one strided view where vLLM fuses what lies side by side. What cannot be adopted is
allocated, and fastgrpo/weights.py fills it whenever the weights are shared; `Adoption.copied` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from fastgrpo.checksum import checksums
from fastgrpo.kernels.cpu_linear import linear
from fastgrpo.sampler.vllm.layout import Owned, parameters
from fastgrpo.sampler.vllm.low_rank import Shapes, add_adapters, use_adapters
from fastgrpo.types import WeightSlice

LOAD_FORMAT = "fastgrpo"


@dataclass(kw_only=True)
class Adoption:
    """What a loading model adopts, and what came of it.

    Example: Adoption(offered=learner.weight_slices()); after loading, copied == {} where every parameter is shared.
    """

    offered: list[WeightSlice]
    adapters: Shapes = field(default_factory=dict)
    """What the policy has beside its matrices, where these are not merged."""
    model: nn.Module | None = None
    copied: dict[str, str] = field(default_factory=dict)
    """vLLM's parameters with memory of their own, and the reason."""

    def weight_slices(self) -> list[WeightSlice]:
        """What the model holds now."""
        assert self.model is not None
        return [s for owned in parameters(self.model) for s in owned.slices(owned.parameter.detach())]


_current: ContextVar[Adoption] = ContextVar("adoption")


@contextmanager
def adopting(adoption: Adoption) -> Iterator[None]:
    """A vLLM engine that is built in this context with load_format=LOAD_FORMAT adopts what is offered."""
    token = _current.set(adoption)
    try:
        yield
    finally:
        _current.reset(token)


@register_model_loader(LOAD_FORMAT)
class AdoptingLoader(BaseModelLoader):
    """Loads nothing: the weights are in memory already."""

    def download_model(self, model_config) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config) -> None:
        raise NotImplementedError("weights are adopted or shared, never loaded")

    def get_external_weight_memory(self, vllm_config) -> int:
        """What gpu_memory_utilization is to count although vLLM does not allocate it."""
        return sum(s.tensor.nbytes for s in _current.get().offered)

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        adoption, device = _current.get(), torch.device(vllm_config.device_config.device)
        with set_default_torch_dtype(model_config.dtype):
            with device, _matrices_on_meta():
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            add_adapters(_linears(model), adoption.adapters)
            adopt(model, adoption, device)
            if device.type == "cpu":
                _use_plain_linears(model)
            else:
                with _refusing_repacking(model):
                    process_weights_after_loading(model, model_config, device)
            use_adapters(model)
        adoption.model = model
        return model.eval()


@contextmanager
def _matrices_on_meta() -> Iterator[None]:
    """Let layers make their weights without memory. Vectors (norms, biases) are made for real, and let go at once."""

    def without_memory(create_weights):
        def create(*args, **kwargs):
            with torch.device("meta"):
                return create_weights(*args, **kwargs)

        return create

    with ExitStack() as stack:
        for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod):
            stack.enter_context(patch.object(method, "create_weights", without_memory(method.create_weights)))
        yield


def _linears(model: nn.Module) -> dict[LinearBase, list[WeightSlice]]:
    """Every linear with what its weight holds."""
    return {
        module: owned.slices(owned.parameter)
        for owned in parameters(model)
        for module, kind in owned.owners
        if isinstance(module, LinearBase) and kind == "weight"
    }


def adopt(model: nn.Module, adoption: Adoption, device: torch.device) -> None:
    """Give every parameter of the model the offered memory, or memory of its own where that cannot be."""
    offered = {s.name: s for s in adoption.offered}  # a rank holds one box of a tensor
    for owned in parameters(model):
        memory = _shared_memory(owned, offered, device)
        if isinstance(memory, str):
            adoption.copied[owned.name] = memory
            memory = torch.zeros(owned.parameter.shape, dtype=owned.parameter.dtype, device=device)
        _replace(owned, memory)


def _shared_memory(owned: Owned, offered: dict[str, WeightSlice], device: torch.device) -> Tensor | str:
    """The learner's memory in the parameter's shape, or why there is none."""
    shape = owned.parameter
    wanted = owned.slices(torch.empty(shape.shape, dtype=shape.dtype, device="meta"))
    held: list[WeightSlice] = []
    for want in wanted:
        found = _part(offered.get(want.name), want)
        if found is None:
            return f"this rank's learner does not hold that part of {want.name}"
        if found.tensor.dtype != shape.dtype:
            return f"the learner's {want.name} is {found.tensor.dtype}, not {shape.dtype}"
        if found.tensor.device.type != device.type:
            return f"the learner's {want.name} is on {found.tensor.device}, not on {device}"
        held.append(found)
    first = held[0].tensor
    base = first.storage_offset() - wanted[0].tensor.storage_offset()
    for want, found in zip(wanted, held, strict=True):
        same_storage = found.tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        offset = base + want.tensor.storage_offset()
        if not same_storage or found.tensor.storage_offset() != offset or not _same_strides(found.tensor, want.tensor):
            return f"the learner's {want.name} is not where the fused parameter has it"
        if found.num_padding_rows < want.num_padding_rows:
            return f"the learner pads {want.name} by {found.num_padding_rows} rows, not {want.num_padding_rows}"
    return first.as_strided(shape.shape, shape.stride(), base)


def _part(whole: WeightSlice | None, want: WeightSlice) -> WeightSlice | None:
    """The wanted box of a slice that contains it, else None."""
    if whole is None or whole.full_shape != want.full_shape:
        return None
    tensor, padding = whole.tensor, whole.num_padding_rows
    for dim, (begin, first, size) in enumerate(zip(want.start, whole.start, want.tensor.shape, strict=True)):
        if begin < first or begin + size > first + whole.tensor.shape[dim]:
            return None
        tensor = tensor.narrow(dim, begin - first, size)
        if dim == 0 and begin + size < first + whole.tensor.shape[0]:
            padding = 0
    return replace(whole, start=want.start, tensor=tensor, num_padding_rows=padding)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """A dimension of one element may have any stride."""
    return all(x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)


def _replace(owned: Owned, memory: Tensor) -> None:
    """Put a parameter over `memory` in the place of one that may have none, with the attributes vLLM gave it."""
    new = nn.Parameter(memory, requires_grad=False)
    new.__class__ = owned.parameter.__class__
    new.__dict__.update(owned.parameter.__dict__)
    for module, kind in owned.owners:
        module._parameters[kind] = new


@contextmanager
def _refusing_repacking(model: nn.Module) -> Iterator[None]:
    """A backend that computes with weights of a form of its own would never see an update; and where it writes that
    form over the old one, as vLLM 0.33 does with equal shapes, it writes over the learner's weights."""
    before = _told_apart(model)
    yield
    for name, what in _told_apart(model).items():
        if what != before.get(name):
            raise NotImplementedError(f"vLLM repacks {name}, which fastgrpo cannot share")


def _told_apart(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every parameter's address, and a checksum of a sample of its elements."""
    owned = parameters(model)
    sums = checksums([each.parameter.detach() for each in owned], phase=0).tolist()
    return {each.name: (each.parameter.data_ptr(), value) for each, value in zip(owned, sums, strict=True)}


def _use_plain_linears(model: nn.Module) -> None:
    """On a CPU vLLM would repack every matrix, and so compute with a copy that no update reaches."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            module.cpu_linear = linear  # type: ignore[assignment]
        elif isinstance(method, UnquantizedFusedMoEMethod):
            method.apply = partial(_plain_experts, module)  # type: ignore[method-assign]
        elif method is not None and not isinstance(module, VocabParallelEmbedding):
            raise NotImplementedError(f"{type(method).__name__} computes with weights that fastgrpo cannot share yet")


def _plain_experts(
    experts: Any, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
) -> Tensor:
    """(T, H), (T, K) weights and numbers of each token's experts -> (T, H), one expert after the other."""
    assert experts.activation == MoEActivation.SILU, experts.activation
    result = torch.zeros_like(x)
    for number, (gate_up, down) in enumerate(zip(experts.w13_weight, experts.w2_weight, strict=True)):
        tokens, choices = (topk_ids == number).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = linear(x[tokens], gate_up).chunk(2, -1)
            out = linear(F.silu(gate) * up, down) * topk_weights[tokens, choices, None]
            result.index_add_(0, tokens, out.to(x.dtype))
    return result
