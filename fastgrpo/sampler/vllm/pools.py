"""The allocators that sleep mode brings, and torch's own.

An engine ends by dropping its pools, and with them the allocators that their memory goes back to. Tensors that are
alive then are freed later, and torch calls the allocator that is no more: the process ends ("pure virtual method
called", pytorch#145168). Where one engine follows another in a process, that is when the next one begins.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_allocators: list[Any] = []
"""Of all engines so far: small, and asked for as long as any of their memory is in use."""


@contextmanager
def pools_outlive_tensors() -> Iterator[None]:
    """Around the end of an engine: its pools go after it, and so after what it holds in them."""
    cumem = sys.modules.get("vllm.device_allocator.cumem")
    instance = None if cumem is None else cumem.CuMemAllocator.instance
    if instance is None:  # nothing ever slept here
        yield
        return
    pools = []
    for entries in instance.allocator_and_pools.values():
        pools += entries if isinstance(entries, list) else [entries]  # some versions have several of a kind
    _allocators.extend(allocator for _, allocator in pools)
    yield
    gc.collect()
    with suppress(SystemError):  # an error left by the callback of a segment that vLLM has freed by hand
        pools.clear()


@contextmanager
def kept_allocator_settings() -> Iterator[None]:
    """Around the making of an engine: vLLM 0.26 sets one of torch's options, and torch then forgets the user's."""
    yield
    asked = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    if asked and torch.cuda.is_available():
        torch.cuda.memory._set_allocator_settings(asked)
