"""A decoder layer's kernels against their twins in float64: norms, rotation, SwiGLU and packed attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.rms_norm import add_norm, rms_norm
from fastgrpo.kernels.rotary import rotary
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.kernels.swiglu import swiglu
from fastgrpo.verify.oracle import relative

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of outputs and gradients, by Frobenius norm: some roundings to the dtype."""
EPSILON = 1e-6
RAGGED = [(70, [200, 1, 0, 333]), (1, [1]), (300, []), (257, [64, 65, 500]), (5, [3, 2])]
"""Prompts and their completions, of every awkward length."""

Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A layer's, and the rows that pass through it."""

    rows: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation at its sizes: what goes in, ours, and its twin, which takes the same in float64 on the CPU."""

    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Outputs]
    twin: Callable[..., Outputs]
    constants: tuple[Tensor, ...] = ()
    """What both take beside the inputs and nobody differentiates."""

    def errors(self) -> dict[str, float]:
        """The largest error of the outputs and of the inputs' gradients, by Frobenius norm."""
        exact = [x.detach().cpu().double().requires_grad_() for x in self.inputs]
        got, want = as_tuple(self.ours(*self.inputs)), as_tuple(self.twin(*exact))
        grads = [torch.randn_like(out) for out in got]
        got_grads = torch.autograd.grad(got, self.inputs, grads)
        want_grads = torch.autograd.grad(want, exact, [grad.cpu().double() for grad in grads])
        pairs = {"output": zip(got, want, strict=True), "gradient": zip(got_grads, want_grads, strict=True)}
        return {quantity: max(relative(g, w) for g, w in each) for quantity, each in pairs.items()}


def operations(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> Iterator[Operation]:
    """All but attention, with random inputs, made one at a time."""
    t, h, f = sizes.rows, sizes.hidden, sizes.ffn
    a, c, d = sizes.heads, sizes.kv_heads, sizes.head

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    yield Operation(
        name="rms_norm",
        inputs=(leaf(t, h), leaf(h)),
        ours=partial(rms_norm, epsilon=EPSILON, backend=backend),
        twin=partial(reference.rms_norm, epsilon=EPSILON),
    )
    yield Operation(
        name="add_norm",
        inputs=(leaf(t, h), leaf(t, h), leaf(h)),
        ours=partial(add_norm, epsilon=EPSILON, backend=backend),
        twin=partial(reference.add_norm, epsilon=EPSILON),
    )
    angles = torch.rand(t, 1, d // 2, device=device).mul(6).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = leaf(t, a + 2 * c, d)

    def turned(x: Tensor, weight: Tensor | None = None) -> Outputs:
        return rotary(x, cos, sin, a, c, weight=weight, epsilon=EPSILON, backend=backend)

    def turned_exactly(x: Tensor, weight: Tensor | None = None) -> Outputs:
        return reference.rotary(x, cos.cpu().double(), sin.cpu().double(), a, c, weight=weight, epsilon=EPSILON)

    turn: dict[str, Any] = {"ours": turned, "twin": turned_exactly, "constants": (cos, sin)}
    yield Operation(name="rotary", inputs=(qkv,), **turn)
    yield Operation(name="normed rotary", inputs=(qkv, leaf(a + c, d)), **turn)
    yield Operation(
        name="swiglu",
        inputs=(leaf(t, 2 * f),),
        ours=partial(swiglu, backend=backend),
        twin=lambda x: reference.swiglu(*x.chunk(2, -1)),
    )


def attention(
    plan: SegmentPlan, segments: Tensor, heads: int, kv_heads: int, head: int, dtype: torch.dtype
) -> Operation:
    """Packed attention over the segments (K, 4), by the plan's kernel, on its device."""
    return Operation(
        name="segment_attention",
        inputs=tuple(
            torch.randn(plan.num_rows, count, head, device=plan.device, dtype=dtype).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        ),
        ours=lambda q, k, v: segment_attention(q, k, v, plan, scale=head**-0.5),
        twin=lambda q, k, v: reference.segment_attention(q, k, v, segments, scale=head**-0.5),
    )


def layout(groups: list[tuple[int, list[int]]]) -> Tensor:
    """(K, 4) int64: segments of prompts, each followed by its completions, from their lengths."""
    rows, at = [], 0
    for prompt, completions in groups:
        start, at = at, at + prompt
        rows.append((start, at, 0, 0))
        for length in completions:
            rows.append((at, at + length, start, start + prompt))
            at += length
    return torch.tensor(rows)


def as_tuple(out: Outputs) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out
