"""policy_loss from logits against copy bandwidth and the peers.

Bytes: a logit is read, read again and its gradient written: 6 bytes in bfloat16, of which the second read may
hit the L2 cache (4 bytes). Rates are given for 6.
"""

from __future__ import annotations

import torch
from harness import Table, Variant, compare
from peers import from_logits, problem

from fastgrpo.kernels import launch
from fastgrpo.kernels.policy_loss import policy_loss

KERNEL = "policy_loss"
SHAPES = ((16384, 151936), (4096, 128256), (32768, 151936))
SMOKE_SHAPES = ((64, 300),)
WARPS = (16, 32)
"""Beside the 8 of launch.py: more threads a row are fewer rows in flight, 132 of 304 KB at 32 warps, which an H200's
L2 holds until their second read."""


def bench(table: Table, *, smoke: bool = False) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    for n, v in SMOKE_SHAPES if smoke else SHAPES:
        p = problem(n, 1, v, dtype, table.device, from_logits=True)
        logits = p.logits
        assert logits is not None

        def ours(p=p, logits=logits):
            return policy_loss(logits, p.batch, p.objective).loss

        def in_place(p=p, logits=logits):
            return policy_loss(logits.detach().requires_grad_(), p.batch, p.objective, in_place=True).loss

        def with_warps(count, ours=ours):
            usual, launch.MAX_WARPS = launch.MAX_WARPS, count
            try:
                return ours()
            finally:
                launch.MAX_WARPS = usual

        runs = {"fastgrpo": ours}
        runs |= {f"fastgrpo, {count} warps": lambda count=count, run=with_warps: run(count) for count in WARPS}
        runs |= from_logits(p)
        variants = {name: (lambda run=run, logits=logits: Variant(run, (logits,))) for name, run in runs.items()}
        # last, because it leaves gradients where the logits were
        variants["fastgrpo in place"] = lambda in_place=in_place: Variant(in_place)
        bytes_moved = 3.0 * n * v * dtype.itemsize
        compare(table, KERNEL, f"N={n},V={v}", variants, rounds=3 if smoke else 10, bytes_moved=bytes_moved)
