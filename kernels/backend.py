"""Which implementation runs, decided in one place and never silently."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


def use_triton(backend: str, tensor: Tensor) -> bool:
    """True for the Triton kernels, False for torch. "auto": Triton for CUDA tensors, torch for CPU tensors and
    for float64, which Triton's kernels do not have.

    backend="triton" on CPU tensors runs in Triton's interpreter, which TRITON_INTERPRET=1 must have asked for
    before Triton was imported. Triton computes in float32, so float64 tensors are refused there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if tensor.device.type == "cuda" and tensor.dtype != torch.float64 else "torch"
    if backend == "torch":
        return False
    if tensor.dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32 and got float64: use backend='torch'")
    if tensor.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend='triton' on a {tensor.device.type} tensor: use backend='torch', or set TRITON_INTERPRET=1 "
            "before Triton is imported to run the kernels in its interpreter"
        )
    return True


@triton.jit
def _probe():
    pass


def interpreting() -> bool:
    """Whether these kernels run in Triton's interpreter, which was decided when they were defined."""
    return not isinstance(_probe, triton.JITFunction)


def refuse_second_derivative(name: str) -> None:
    """Called in a backward pass: autograd leaves gradient recording on there only for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its gradient is computed without a graph; "
            "use create_graph=False, or fastgrpo.kernels.reference"
        )


def take_once(ctx: Any, name: str) -> Any:
    """The gradients a forward pass left on ctx; they are handed out, scaled in place, a single time."""
    grads = ctx.grads
    if grads is None:
        raise RuntimeError(f"backward ran twice through {name}: its gradient is handed out once; run it forward again")
    ctx.grads = None
    return grads


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if torch.cuda.is_initialized() else nullcontext()
