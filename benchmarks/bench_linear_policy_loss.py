"""linear_policy_loss against its own three cuBLAS GEMMs and the peers, from hidden states to gradients.

Operations: 6 N H V (gradient in the forward pass). Its floor is the time of those GEMMs in this process.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from harness import Table, Variant, compare
from peers import from_hidden, problem

from fastgrpo.kernels import chunks
from fastgrpo.kernels.chunks import ChunkRows
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import CustomSurrogate, SurrogateInputs, SurrogateValues

KERNEL = "linear_policy_loss"
SHAPES = ((32768, 4096, 151936), (16384, 2048, 151936), (4096, 4096, 128256), (8192, 896, 151936))
SMOKE_SHAPES = ((64, 16, 300),)
CHUNKS = ((1024, 1024), (512, 2048), (512, 4096), (1024, 4096))
"""Rows of logits and of gradients beside those that the kernels choose, whatever memory they take: to see whether the
choice is right."""
SMOKE_CHUNKS = ((16, 32),)


def clip_in_torch(x: SurrogateInputs) -> SurrogateValues:
    """The objective's own clip at 0.2, through autograd."""
    return -torch.minimum(x.ratio * x.advantages, x.ratio.clamp(0.8, 1.2) * x.advantages), {}


OWN_CLIP = CustomSurrogate(name="clip", function=clip_in_torch)


def bench(table: Table, *, smoke: bool = False) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    for n, h, v in SMOKE_SHAPES if smoke else SHAPES:
        p = problem(n, h, v, dtype, table.device, from_logits=False)
        hidden, weight = p.hidden, p.weight
        assert hidden is not None
        assert weight is not None

        def ours(logits_dtype=None, hidden=hidden, weight=weight, p=p):
            return linear_policy_loss(hidden, weight, p.batch, p.objective, logits_dtype=logits_dtype).loss

        def in_chunks(logits, gradients, ours=ours):
            usual = chunks.chunk_rows
            chunks.chunk_rows = lambda *_, **__: ChunkRows(logits=logits, gradients=gradients)
            try:
                return ours()
            finally:
                chunks.chunk_rows = usual

        def own_surrogate(hidden=hidden, weight=weight, p=p):
            return linear_policy_loss(hidden, weight, p.batch, replace(p.objective, surrogate=OWN_CLIP)).loss

        runs = {"fastgrpo": ours, "fastgrpo, clip as one's own surrogate": own_surrogate}
        if not smoke:
            runs["fastgrpo bf16 tile"] = lambda ours=ours: ours(torch.bfloat16)
        for sizes in SMOKE_CHUNKS if smoke else CHUNKS:
            runs["fastgrpo {} of {} rows".format(*sizes)] = lambda sizes=sizes, run=in_chunks: run(*sizes)
        leaves = (hidden, weight)
        variants = {name: (lambda run=run, leaves=leaves: Variant(run, leaves)) for name, run in runs.items()}
        variants["three GEMMs"] = lambda hidden=hidden, weight=weight: Variant(gemms(hidden.detach(), weight.detach()))
        variants |= {
            name: (lambda run=run, leaves=leaves: Variant(run, leaves)) for name, run in from_hidden(p).items()
        }
        x = f"N={n},H={h},V={v}"
        medians = compare(table, KERNEL, x, variants, rounds=3 if smoke else 5, flops=6.0 * n * h * v)
        floor = medians.pop("three GEMMs", None)
        if floor is not None:
            for name, median in medians.items():
                table.add(KERNEL, name, "full", "over_gemms", "ratio", x, [median / floor])


def gemms(hidden: torch.Tensor, weight: torch.Tensor, rows: int = 4096):
    """Z = X W^T, dX = Z W, dW = Z^T X in chunks of rows, nothing else: what the matrix units need."""
    tile = hidden.new_empty(min(rows, hidden.shape[0]), weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, hidden.shape[0], rows):
            x = hidden[start : start + rows]
            z = tile[: x.shape[0]]
            torch.mm(x, weight.T, out=z)
            torch.mm(z, weight, out=grad_hidden[start : start + rows])
            torch.addmm(grad_weight, z.T, x, beta=float(start > 0), out=grad_weight)

    return run
