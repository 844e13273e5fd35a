"""logprobs from logits: forward alone against copy bandwidth, and with its backward pass against plain torch.

Bytes forward: 2 a bfloat16 logit. Full: read, read again, write: 6.
"""

from __future__ import annotations

import torch
from harness import Table, Variant, compare
from peers import has, problem, trl_logprobs

from fastgrpo.kernels.logprobs import logprobs

KERNEL = "logprobs"
SHAPES = ((16384, 151936), (4096, 128256))
SMOKE_SHAPES = ((64, 300),)


def bench(table: Table, *, smoke: bool = False) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    for n, v in SMOKE_SHAPES if smoke else SHAPES:
        p = problem(n, 1, v, dtype, table.device, from_logits=True)
        logits, targets = p.logits, p.batch.targets
        assert logits is not None
        runs = {
            "fastgrpo": lambda logits=logits, targets=targets: logprobs(logits, targets),
            "torch eager": lambda logits=logits, targets=targets: torch.log_softmax(logits.float(), -1).gather(
                1, targets[:, None]
            ),
        }
        if has("trl") and logits.is_cuda:
            runs["trl logprob"] = lambda logits=logits, targets=targets: trl_logprobs(logits, targets)
        x, size = f"N={n},V={v}", float(n * v * dtype.itemsize)
        rounds = 3 if smoke else 10

        def without_gradient(run):
            with torch.no_grad():
                run()

        alone = {name: (lambda run=run: Variant(lambda: without_gradient(run))) for name, run in runs.items()}
        compare(table, f"{KERNEL} (no grad)", x, alone, rounds=rounds, bytes_moved=size)
        full = {
            name: (lambda run=run, logits=logits: Variant(lambda: run().sum(), (logits,))) for name, run in runs.items()
        }
        compare(table, KERNEL, x, full, rounds=rounds, bytes_moved=3.0 * size)
