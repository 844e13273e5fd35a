"""Packed attention with shared prompts, against flash attention over repeated prompts and over a padded batch.

All three attend the same completions; the first computes a prompt's rows once, the others once a completion. `kernels`
names the implementations that are installed, and `wrong` holds each to float64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Table, Variant, compare
from torch import Tensor

from fastgrpo.kernels import varlen_kernels
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.verify.layers import RAGGED, TOLERANCE, attention, layout

KERNEL = "segment_attention"
SHAPES = ((512, 2048, 16, 1), (1024, 1024, 8, 2), (4096, 1024, 8, 1), (128, 512, 8, 4))
"""(P, R, G, groups): prompt, longest completion, completions of a prompt."""
SMOKE_SHAPES = ((9, 12, 3, 2),)
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128


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


def wrong(device: torch.device, name: str | None) -> list[str]:
    """What is not float64's to the rounding of bfloat16, with and without heads that share keys."""
    kernel = None if name is None else varlen_kernels.choose(name)
    segments, dtype, found = layout(RAGGED), torch.bfloat16, []
    plan = SegmentPlan(segments, device, kernel=kernel)
    for sizes in ((4, 4, 64), (8, 2, 128)):
        torch.manual_seed(0)
        errors = attention(plan, segments, *sizes, dtype).errors()
        if not all(error <= TOLERANCE[dtype] for error in errors.values()):
            found.append(f"heads, key/value heads and their size {sizes}: {errors}")
    return found
