"""The passes over memory between a decoder layer's products: norms, rotation, SwiGLU; at Qwen3-1.7B's sizes.

Peers compute the same: Hugging Face's formulas as they are and compiled, and Liger's kernels. Bytes are those that a
fused pass needs, inputs read and outputs written once each way, so `of_copy` is the share of the limit.
`is_exact` holds each operation to float64. On any machine

    python benchmarks/bench_decoder_layer.py

counts the bytes that Hugging Face's formulas move, operator by operator on tensors without numbers, beside the fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import Table, Variant, compare
from peers import has
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrpo.kernels import reference
from fastgrpo.kernels.rms_norm import add_norm, rms_norm
from fastgrpo.kernels.rotary import rotary
from fastgrpo.kernels.swiglu import swiglu

KERNEL = "decoder_layer"
EPSILON = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of Qwen3-1.7B, and the tokens of a step of the benchmarks of the learner."""

    rows: int = 32768
    hidden: int = 2048
    ffn: int = 6144
    heads: int = 16
    kv_heads: int = 8
    head: int = 128


SMOKE_SIZES = Sizes(rows=9, hidden=48, ffn=80, heads=4, kv_heads=2, head=16)


@dataclass(frozen=True)
class Operation:
    """One operation at its sizes: inputs, ours on them, the twin on them in float64, and what others do."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    twin: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    num_bytes: int
    """Read and written by both ways together."""


def bench(table: Table, *, smoke: bool = False) -> None:
    sizes, dtype = (SMOKE_SIZES, torch.float32) if smoke else (Sizes(), torch.bfloat16)
    for name, operation in operations(sizes, dtype, table.device):
        providers = {"fastgrpo": operation.ours, **operation.theirs}
        with torch.no_grad():
            grads = tuple(torch.randn_like(out) for out in _as_tuple(operation.ours(*operation.inputs)))

        def variant(run: Callable, inputs: tuple[Tensor, ...] = operation.inputs, grads=grads) -> Variant:
            return Variant(lambda: run(*inputs), inputs, grads)

        compare(
            table,
            name,
            f"T={sizes.rows}",
            {provider: (lambda run=run, variant=variant: variant(run)) for provider, run in providers.items()},
            rounds=3 if smoke else 20,
            bytes_moved=float(operation.num_bytes),
        )


def is_exact(device: torch.device, *, smoke: bool) -> bool:
    """Outputs and gradients are float64's to the dtype's rounding, at full and at awkward sizes."""
    ragged = Sizes(rows=999, hidden=1000, ffn=2300, heads=14, kv_heads=2, head=80)
    for sizes in (SMOKE_SIZES,) if smoke else (Sizes(rows=4096), ragged):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            for name, operation in operations(sizes, dtype, device):
                wide = [x.detach().double().requires_grad_() for x in operation.inputs]
                ours = _as_tuple(operation.ours(*operation.inputs))
                twin = _as_tuple(operation.twin(*wide))
                grads = [torch.randn_like(out) for out in ours]
                got = (*ours, *torch.autograd.grad(ours, operation.inputs, grads))
                want = (*twin, *torch.autograd.grad(twin, wide, [grad.double() for grad in grads]))
                if not all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(got, want, strict=True)):
                    print(f"{name} at {sizes} in {dtype} is wrong")
                    return False
    return True


class _Traffic(TorchDispatchMode):
    """num_bytes: of the tensors that operators take and give, both ways, views left out."""

    num_bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.num_bytes += sum(x.nbytes for x in tensors)
        return out


def main() -> None:
    sizes = Sizes()
    print(f"{'bytes a token, both ways':<26}{'fused':>10}{'operators':>12}")
    for name, operation in operations(sizes, torch.bfloat16, torch.device("meta")):
        with _Traffic() as traffic:
            outs = _as_tuple(operation.theirs["hugging face"](*operation.inputs))
            torch.autograd.grad(outs, operation.inputs, [out.detach() for out in outs])
        print(f"{name:<26}{operation.num_bytes // sizes.rows:>10,}{traffic.num_bytes // sizes.rows:>12,}")


def operations(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Operation]]:
    """(name, operation), made one at a time."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    t, h, f = sizes.rows, sizes.hidden, sizes.ffn
    a, c, d = sizes.heads, sizes.kv_heads, sizes.head
    size = dtype.itemsize
    yield (
        "rms_norm",
        Operation(
            (leaf(t, h), leaf(h)),
            lambda x, w: rms_norm(x, w, EPSILON),
            lambda x, w: reference.rms_norm(x, w, EPSILON),
            _peers(_hf_norm, device, liger=_liger_norm)
            | {"torch rms_norm": lambda x, w: F.rms_norm(x, (h,), w, EPSILON)},
            5 * size * t * h,
        ),
    )
    yield (
        "add_norm",
        Operation(
            (leaf(t, h), leaf(t, h), leaf(h)),
            lambda x, y, w: add_norm(x, y, w, EPSILON),
            lambda x, y, w: reference.add_norm(x, y, w, EPSILON),
            _peers(_hf_add_norm, device, liger=_liger_add_norm),
            8 * size * t * h,
        ),
    )
    halves = torch.rand(t, 1, d // 2, device=device).mul(6).repeat(1, 1, 2)
    cos, sin = halves.cos().to(dtype), halves.sin().to(dtype)
    for normed in (True, False):
        norms = (torch.ones(a + c, d, device=device, dtype=dtype).requires_grad_(),) if normed else ()
        options = {"epsilon": EPSILON} if normed else {}
        yield (
            "normed rotary" if normed else "rotary",
            Operation(
                (leaf(t, a + 2 * c, d), *norms),
                lambda x, w=None, o=options: rotary(x, cos, sin, a, c, weight=w, **o),
                lambda x, w=None, o=options: reference.rotary(x, cos.double(), sin.double(), a, c, weight=w, **o),
                _peers(lambda x, w=None: _hf_rotary(x, cos, sin, a, c, w), device),
                size * t * d * ((5 if normed else 4) * (a + c) + (2 if normed else 4) * c),
            ),
        )
    yield (
        "swiglu",
        Operation(
            (leaf(t, 2 * f),),
            swiglu,
            lambda x: reference.swiglu(*x.chunk(2, -1)),
            _peers(lambda x: F.silu(x[:, :f]) * x[:, f:], device, liger=_liger_swiglu),
            8 * size * t * f,
        ),
    )


def _peers(plain: Callable, device: torch.device, liger: Callable | None = None) -> dict[str, Callable]:
    peers = {"hugging face": plain}
    if device.type == "cuda":
        peers["hugging face, compiled"] = torch.compile(plain)
        if liger is not None and has("liger_kernel"):
            peers["liger"] = liger
    return peers


def _hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm, Qwen3RMSNorm and the others."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def _hf_add_norm(stream: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + change
    return total, _hf_norm(total, weight)


def _hf_rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, weight: Tensor | None
) -> tuple[Tensor, ...]:
    *qk, value = qkv.split([heads, kv_heads, kv_heads], 1)
    if weight is not None:
        qk = [_hf_norm(x, w[0]) for x, w in zip(qk, weight.split([heads, kv_heads]), strict=True)]
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


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


if __name__ == "__main__":
    main()
