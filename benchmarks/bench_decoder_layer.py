"""The passes over memory between a decoder layer's products: norms, rotation, SwiGLU; at Qwen3-1.7B's sizes.

Peers compute the same: Hugging Face's formulas as they are and compiled, and Liger's kernels. Bytes are those that a
fused pass needs, inputs read and outputs written once each way, so `of_copy` is the share of the limit.
`wrong` holds each operation to float64. On any machine

    python benchmarks/bench_decoder_layer.py

counts the bytes that Hugging Face's formulas move, operator by operator on tensors without numbers, beside the fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Table, Variant, compare
from peers import has
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrpo.verify.layers import EPSILON, TOLERANCE, Operation, Outputs, Sizes, as_tuple, operations

KERNEL = "decoder_layer"
QWEN3_1_7B = Sizes(rows=32768, hidden=2048, ffn=6144, heads=16, kv_heads=8, head=128)
"""With the tokens of a step of bench_learner.py."""
SMOKE_SIZES = Sizes(rows=9, hidden=48, ffn=80, heads=4, kv_heads=2, head=16)
RAGGED_SIZES = Sizes(rows=999, hidden=1000, ffn=2300, heads=14, kv_heads=2, head=80)


def bench(table: Table, *, smoke: bool = False) -> None:
    sizes, dtype = (SMOKE_SIZES, torch.float32) if smoke else (QWEN3_1_7B, torch.bfloat16)
    for operation in operations(sizes, dtype, table.device):
        providers = {"fastgrpo": operation.ours, **peers(operation, sizes, table.device)}
        with torch.no_grad():
            grads = tuple(torch.randn_like(out) for out in as_tuple(operation.ours(*operation.inputs)))

        def variant(run: Callable, inputs: tuple[Tensor, ...] = operation.inputs, grads=grads) -> Variant:
            return Variant(lambda: run(*inputs), inputs, grads)

        compare(
            table,
            operation.name,
            f"T={sizes.rows}",
            {provider: partial(variant, run) for provider, run in providers.items()},
            rounds=3 if smoke else 20,
            bytes_moved=float(fused_bytes(operation, sizes)),
        )


def wrong(device: torch.device, *, smoke: bool) -> list[str]:
    """What is not float64's to the dtype's rounding, at the model's sizes and at awkward ones."""
    found = []
    for sizes in (SMOKE_SIZES,) if smoke else (replace(QWEN3_1_7B, rows=2048), RAGGED_SIZES):
        for dtype in (torch.float32, torch.bfloat16):
            for operation in operations(sizes, dtype, device):
                errors = operation.errors()
                if not all(error <= TOLERANCE[dtype] for error in errors.values()):
                    found.append(f"{operation.name} at {sizes} in {dtype}: {errors}")
    return found


def main() -> None:
    print(f"{'bytes a token, both ways':<26}{'fused':>10}{'operators':>12}")
    for operation in operations(QWEN3_1_7B, torch.bfloat16, torch.device("meta")):
        with _Traffic() as traffic:
            outs = as_tuple(HUGGING_FACE[operation.name](operation, QWEN3_1_7B, *operation.inputs))
            torch.autograd.grad(outs, operation.inputs, [out.detach() for out in outs])
        rows, fused = QWEN3_1_7B.rows, fused_bytes(operation, QWEN3_1_7B)
        print(f"{operation.name:<26}{fused // rows:>10,}{traffic.num_bytes // rows:>12,}")


def fused_bytes(operation: Operation, sizes: Sizes) -> int:
    """Read and written by both ways together, where each tensor is passed over once."""
    qk, v = (sizes.heads + sizes.kv_heads) * sizes.head, sizes.kv_heads * sizes.head
    elements = {
        "rms_norm": 5 * sizes.hidden,
        "add_norm": 8 * sizes.hidden,
        "rotary": 4 * qk + 4 * v,  # the values are copied, so that the product can go
        "normed rotary": 5 * qk + 2 * v,
        "swiglu": 8 * sizes.ffn,
    }
    return sizes.rows * elements[operation.name] * operation.inputs[0].itemsize


def peers(operation: Operation, sizes: Sizes, device: torch.device) -> dict[str, Callable[..., Outputs]]:
    """Who else computes it, by name."""
    plain = partial(HUGGING_FACE[operation.name], operation, sizes)
    found: dict[str, Callable[..., Outputs]] = {"hugging face": plain}
    if operation.name == "rms_norm":
        found["torch rms_norm"] = lambda x, weight: F.rms_norm(x, weight.shape, weight, EPSILON)
    if device.type == "cuda":
        found["hugging face, compiled"] = torch.compile(plain)
        if operation.name in LIGER and has("liger_kernel"):
            found["liger"] = LIGER[operation.name]
    return found


class _Traffic(TorchDispatchMode):
    """num_bytes: of the tensors that operators take and give, both ways, views left out."""

    num_bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.num_bytes += sum(x.nbytes for x in tensors)
        return out


def _hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm, Qwen3RMSNorm and the others."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def _hf_add_norm(stream: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + change
    return total, _hf_norm(total, weight)


def _hf_rotary(operation: Operation, sizes: Sizes, qkv: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    heads = [sizes.heads, sizes.kv_heads]
    cos, sin = operation.constants
    *qk, value = qkv.split([*heads, sizes.kv_heads], 1)
    if weight is not None:
        qk = [_hf_norm(x, w[0]) for x, w in zip(qk, weight.split(heads), strict=True)]
    return *(
        x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin for x in qk
    ), value


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPSILON, 0.0, "llama", False)


def _liger_add_norm(stream: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    out, total = LigerFusedAddRMSNormFunction.apply(change, stream, weight, EPSILON, 0.0, "llama", False)
    return total, out


def _liger_swiglu(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(gate_up)


HUGGING_FACE: dict[str, Callable[..., Outputs]] = {
    "rms_norm": lambda _, __, x, weight: _hf_norm(x, weight),
    "add_norm": lambda _, __, stream, change, weight: _hf_add_norm(stream, change, weight),
    "rotary": _hf_rotary,
    "normed rotary": _hf_rotary,
    "swiglu": lambda _, sizes, x: F.silu(x[:, : sizes.ffn]) * x[:, sizes.ffn :],
}
LIGER: dict[str, Callable[..., Outputs]] = {
    "rms_norm": _liger_norm,
    "add_norm": _liger_add_norm,
    "swiglu": _liger_swiglu,
}


if __name__ == "__main__":
    main()
