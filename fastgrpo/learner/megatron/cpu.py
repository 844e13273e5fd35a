"""Megatron-core on a machine without a GPU, unedited.

Megatron names the CUDA device outright. While `megatron_on_cpu` is open, Megatron's own modules, and they alone, see
a view of `torch` in which that device is the CPU:

    torch.cuda.current_device()                     -> torch.device("cpu")
    torch.cuda.synchronize(), .empty_cache()        -> nothing
    torch.cuda.Stream, .stream(), .current_stream() -> one that does nothing, whose events have happened
    torch.zeros, ones, empty, full, tensor(device="cuda")  -> on the CPU
    the sizes of an all-to-all, kept on the GPU     -> already on the CPU
    the CUDA generator's state (kept while activations are recomputed)  -> an empty tensor; nothing here is random
    Tensor.cuda()                                   -> the tensor itself         (on torch.Tensor, for every caller)
    Tensor.type()                                   -> "torch.cuda.FloatTensor"  (on torch.Tensor, for every caller:
                                                       Megatron's optimizers compare that string)

No collective, schedule, layer or optimizer is replaced. Where a GPU is present nothing at all is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("zeros", "ones", "empty", "full", "tensor")


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let Megatron's modules take the CPU for their CUDA device; may be nested; does nothing where a GPU is present.

    Modules of Megatron imported while it is open do not get the view, so import what is needed before.
    """
    import megatron.core.tensor_parallel.random as megatron_random

    if torch.cuda.is_available() or isinstance(megatron_random.torch, _View):
        yield
        return
    with _replaced(_replacements(megatron_random)):
        yield


def _replacements(megatron_random: ModuleType) -> list[tuple[Any, str, Any]]:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    view = _cpu_view()
    users = [module for name, module in sys.modules.items() if name.split(".")[0] == "megatron"]
    return [
        *((module, "torch", view) for module in users if getattr(module, "torch", None) is torch),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.empty(0, dtype=torch.uint8)),
        (megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _sizes_on_cpu),
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch.Tensor, "type", _cuda_type(torch.Tensor.type)),
    ]


@contextmanager
def _replaced(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


class _View(ModuleType):
    """A module with some of its names replaced."""

    def __init__(self, module: ModuleType, replacements: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replacements, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Stream:
    """A stream on which everything has happened already; also the context and the events it gives."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: _Stream) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


@functools.cache
def _cpu_view() -> _View:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    stream = _Stream()
    cuda = _View(
        torch.cuda,
        {
            "current_device": lambda: CPU,
            "synchronize": nothing,
            "empty_cache": nothing,
            "Stream": lambda *_, **__: stream,
            "current_stream": lambda *_: stream,
            "stream": lambda *_: stream,
        },
    )
    return _View(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES}})


def _sizes_on_cpu(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Megatron's own leaves a tensor that is on the CPU as it is, where a collective wants numbers."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).split(":")[0] == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _cuda_type(real: Callable[..., Any]) -> Callable[..., Any]:
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return real(tensor, *args, **kwargs)
        return real(tensor).replace("torch.", "torch.cuda.", 1)

    return type_
