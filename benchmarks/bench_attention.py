"""Packed attention with shared prompts, against flash attention over repeated prompts and over a padded batch.

All three attend the same completions; the first computes a prompt's rows once, the others once a completion. `kernels`
names the implementations that are installed, and `is_exact` holds each to float64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Table, Variant, compare
from torch import Tensor

from fastgrpo.kernels import reference, varlen_kernels
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention

KERNEL = "segment_attention"
SHAPES = ((512, 2048, 16, 1), (1024, 1024, 8, 2), (4096, 1024, 8, 1), (128, 512, 8, 4))
"""(P, R, G, groups): prompt, longest completion, completions of a prompt."""
SMOKE_SHAPES = ((9, 12, 3, 2),)
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
RAGGED = [(70, [200, 1, 0, 333]), (1, [1]), (300, []), (257, [64, 65, 500]), (5, [3, 2])]
"""Prompts and completions of every awkward length."""


def bench(table: Table, *, smoke: bool = False) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    heads, kv_heads, size = (4, 2, 16) if smoke else (HEADS, KV_HEADS, HEAD_SIZE)
    for prompt, longest, group_size, num_groups in SMOKE_SHAPES if smoke else SHAPES:
        rng = random.Random(0)
        groups = [(prompt, [rng.randint(longest // 2, longest) for _ in range(group_size)]) for _ in range(num_groups)]

        def leaves(*rows: int) -> tuple[Tensor, ...]:
            return tuple(
                torch.randn(*rows, count, size, device=table.device, dtype=dtype, requires_grad=True)
                for count in (heads, kv_heads, kv_heads)
            )

        def packed(name: str | None, share: bool, groups=groups) -> Variant:
            segments = layout(groups) if share else layout([(0, [p + r]) for p, each in groups for r in each])
            kernel = None if name is None else varlen_kernels.choose(name)
            plan, qkv = SegmentPlan(segments, table.device, kernel=kernel), leaves(int(segments[-1, 1]))
            return Variant(lambda: segment_attention(*qkv, plan, scale=size**-0.5).sum(), qkv)

        def padded(groups=groups) -> Variant:
            lengths = [p + r for p, each in groups for r in each]
            qkv = leaves(len(lengths), max(lengths))
            q, k, v = (x.transpose(1, 2) for x in qkv)
            attend = F.scaled_dot_product_attention
            return Variant(lambda: attend(q, k, v, is_causal=True, enable_gqa=True).sum(), qkv)

        x = f"P={prompt},R={longest},G={group_size},groups={num_groups}"
        for name in kernels(table.device):  # in turns within one alone: torch's operators are the process's
            by = "" if name is None else f", {name}"
            variants = {
                f"fastgrpo{by}": lambda name=name: packed(name, True),
                f"prompts repeated{by}": lambda name=name: packed(name, False),
                f"padded sdpa{by}": padded,
            }
            compare(table, KERNEL, x, variants, rounds=3 if smoke else 10)


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


def kernels(device: torch.device) -> Iterator[str | None]:
    """The implementations there are for the device; None is a CPU's."""
    if device.type == "cpu":
        yield None
        return
    for name in varlen_kernels.NAMES[1:]:
        try:
            varlen_kernels.choose(name)
        except ValueError as error:
            print(f"attention of {name}: {error}")
        else:
            yield name
    varlen_kernels.choose("auto")


def is_exact(device: torch.device, name: str | None) -> bool:
    """Outputs and gradients are float64's to the rounding of bfloat16, with and without heads that share keys."""
    kernel = None if name is None else varlen_kernels.choose(name)
    segments = layout(RAGGED)
    plan = SegmentPlan(segments, device, kernel=kernel)
    for heads, kv_heads, size in ((4, 4, 64), (8, 2, 128)):
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(plan.num_rows, count, size, device=device, dtype=torch.bfloat16)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        results = []
        for compute, which, dtype in (
            (segment_attention, plan, torch.bfloat16),
            (reference.segment_attention, segments, torch.float64),
        ):
            inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
            out = compute(*inputs, which, scale=size**-0.5)
            results.append((out, *torch.autograd.grad(out, inputs, grad.to(dtype))))
        if not all((a.double() - b).norm() <= 1e-2 * b.norm() for a, b in zip(*results, strict=True)):
            return False
    return True
