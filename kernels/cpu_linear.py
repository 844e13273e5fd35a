"""float32 matrix products on a CPU through oneDNN.

torch passes float32 products to MKL, which runs at half speed or less on CPUs not made by Intel. The oneDNN in the same
wheel does not: on a 2-core AMD EPYC 9005, it runs a (4608, 256) x (256, 256) product at 368 GFLOP/s, against MKL's 162,
both in exact float32 (`python benchmarks/bench_cpu_linear.py` measures this on your machine). Models on a CPU therefore
compute their linear layers here; anything but a float32 CPU tensor takes torch's usual path.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this many rows the call itself costs more than the product.
MIN_ROWS = 8


def is_available() -> bool:
    """Whether this build of torch includes oneDNN's linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M, K), (N, K) -> a b^T (M, N); either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` accepts it: a non-empty float32 matrix on a CPU, in a torch that includes oneDNN."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0 and is_available()


def pack(weight: Tensor, num_rows: int) -> Tensor:
    """A copy of weight (N, K) in the layout that oneDNN multiplies with, for `linear` without gradients.

    Without packing, every product converts the weight to that layout anew, which takes a third of the time of a
    product with 64 rows. num_rows: the rows of most products; other numbers of rows give correct results too.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = _product(grad, weight.t()) if need_x else None
        grad_weight = None
        if need_weight:  # oneDNN wants its rows contiguous, and would take longer to make them so than this copy
            grad_weight = _product(grad.t().contiguous(), x.t())
        return grad_x, grad_weight, grad.sum(0) if need_bias and ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K), (N, K), (N,) -> (..., N).

    float32 CPU tensors with at least MIN_ROWS rows go through oneDNN where torch includes it, as do all with a packed
    weight. There are no second derivatives then. Everything else goes through torch.nn.functional.linear.
    """
    if weight.is_mkldnn:
        return _product(x, weight, bias)
    num_rows, empty = math.prod(x.shape[:-1]), 0 in weight.shape  # a vocabulary shard may be nothing but padding
    if x.device.type != "cpu" or x.dtype != torch.float32 or num_rows < MIN_ROWS or empty or not is_available():
        return F.linear(x, weight, bias)
    compute = _Linear.apply if torch.is_grad_enabled() else _product  # decoding is many small calls
    return compute(x.reshape(num_rows, -1), weight, bias).view(*x.shape[:-1], -1)


class CpuLinear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_cpu_linear(model: nn.Module) -> None:
    """Make every plain nn.Linear of the model compute through `linear`; parameters and their names do not change."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
