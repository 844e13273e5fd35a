"""Flash attention over sequences of any lengths in one call: which implementation, and how each is called.

    torch         the kernels of FlashAttention-2 that every CUDA build of torch has
    flash_attn    those of the flash_attn package, 2.7 or newer
    flash_attn_3  FlashAttention-3, for Hopper, from the package of its own: torch's operators are pointed to it

The choice is the process's, as torch's own is, and is made once: `choose(name)`, or "auto" where nobody chose.
Sources: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp and flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from fastgrpo.kernels.dense_attention import fits_flash

aten = torch.ops.aten
NAMES = ("auto", "torch", "flash_attn", "flash_attn_3")


@dataclass(frozen=True)
class Sequences:
    """S sequences of queries and of keys, each lying one after the other. A sequence may have no keys.

    Example: Sequences(cu_q=tensor([0, 7, 19]), cu_k=tensor([0, 0, 7]), max_q=12, max_k=7).
    """

    cu_q: Tensor
    """(S+1,) int32 on the device: where each sequence's queries start, and where the last one's end."""
    cu_k: Tensor
    max_q: int
    """The longest sequence's queries."""
    max_k: int


@dataclass(frozen=True)
class VarlenKernel:
    """An implementation. q: (T, A, D); k, v: (M, C, D) with A a multiple of C; rows need not be contiguous.

    Causal attention needs as many queries as keys in each sequence. Without a key a query's output is 0.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Sequences, bool, float], tuple[Tensor, Tensor]]
    """(q, k, v, sequences, causal, scale) -> out (T, A, D), lse (A, T) float32; lse is infinite without a key."""
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequences, bool, float], tuple[Tensor, Tensor, Tensor]
    ]
    """(grad, q, k, v, out, lse, sequences, causal, scale) -> dq, dk, dv. out and lse may be those of a
    larger softmax that contains this one."""
    takes: Callable[[Tensor], bool] = fits_flash
    """Whether it computes queries of this type and head size."""


def choose(name: str) -> VarlenKernel:
    """The implementation of that name, which the whole process uses from here on.

    auto: flash_attn where it is installed, else torch. Raises ValueError, to be read after the option's name and
    value, for one that is not there.
    """
    global _chosen
    if name not in NAMES:
        raise ValueError(f"choose one of {', '.join(NAMES)}")
    if name == "auto":
        name = "flash_attn" if _has_flash_attn() else "torch"
    if _chosen is not None and _chosen.name == "flash_attn_3":
        torch.nn.attention.restore_flash_attention_impl()
    _chosen = {"torch": _torch, "flash_attn": _flash_attn, "flash_attn_3": _flash_attn_3}[name]()
    return _chosen


def chosen() -> VarlenKernel:
    """What choose() was last asked for; "auto" before that."""
    return _chosen or choose("auto")


_chosen: VarlenKernel | None = None


def _has_flash_attn() -> bool:
    # The compiled module, because FlashAttention-4 installs a flash_attn without it.
    return find_spec("flash_attn_2_cuda") is not None


def _torch() -> VarlenKernel:
    return VarlenKernel("torch", _torch_forward, _torch_backward)


def _flash_attn_3() -> VarlenKernel:
    if find_spec("flash_attn_interface") is None:
        raise ValueError("the package flash_attn_3 is not installed; install it, or use auto")
    if torch.cuda.get_device_capability()[0] != 9:
        raise ValueError("it is for Hopper GPUs and this one is another; use auto")
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{error}; install a flash_attn_3 and a torch that go together, or use auto") from None
    return VarlenKernel("flash_attn_3", _torch_forward, _torch_backward)


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    s = sequences
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def _torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    s = sequences
    random = q.new_empty(0, dtype=torch.uint64)  # only dropout has a state
    return aten._flash_attention_backward(
        grad, q, k, v, out, lse, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, random, random, scale=scale
    )


def _flash_attn() -> VarlenKernel:
    if not _has_flash_attn():
        raise ValueError("the package flash_attn is not installed; install it, or use auto")
    found = version("flash_attn")
    if tuple(map(int, found.split(".")[:2])) < (2, 7):
        raise ValueError(f"the package flash_attn is {found} here; install 2.7 or newer, or use torch")
    try:
        package = import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        raise ValueError(f"{error}; install a flash_attn that was built for this torch, or use torch") from None

    def forward(q, k, v, sequences: Sequences, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        s = sequences
        out, lse, *_ = package._flash_attn_varlen_forward(
            q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, dropout_p=0.0, softmax_scale=scale, causal=causal
        )
        return out, lse

    def backward(grad, q, k, v, out, lse, sequences: Sequences, causal: bool, scale: float):
        s, grads = sequences, (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        package._flash_attn_varlen_backward(
            *(grad, q, k, v, out, lse, *grads, s.cu_q, s.cu_k, s.max_q, s.max_k),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    return VarlenKernel("flash_attn", forward, backward)
