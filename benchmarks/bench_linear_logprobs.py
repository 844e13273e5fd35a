"""linear_logprobs: the forward pass that old and reference logprobs cost, and with its backward pass.

Operations: 2 N H V forward, 8 N H V with the backward pass, which computes the logits again.
"""

from __future__ import annotations

import torch
from harness import Table, Variant, compare
from peers import cce_logprobs, has, problem, trl_chunked, trl_logprobs

from fastgrpo.kernels.linear_logprobs import linear_logprobs

KERNEL = "linear_logprobs"
SHAPES = ((16384, 2048, 151936), (4096, 4096, 128256))
SMOKE_SHAPES = ((64, 16, 300),)


def bench(table: Table, *, smoke: bool = False) -> None:
    dtype = torch.float32 if smoke else torch.bfloat16
    for n, h, v in SMOKE_SHAPES if smoke else SHAPES:
        p = problem(n, h, v, dtype, table.device, from_logits=False)
        hidden, weight, batch = p.hidden, p.weight, p.batch
        assert hidden is not None
        assert weight is not None
        runs = {
            "fastgrpo": lambda x=hidden, w=weight, b=batch: linear_logprobs(x, w, b.targets),
            "torch eager": lambda x=hidden, w=weight, b=batch: torch.log_softmax((x @ w.T).float(), -1).gather(
                1, b.targets[:, None]
            ),
        }
        if hidden.is_cuda:
            if has("cut_cross_entropy"):
                runs["cut-cross-entropy"] = lambda x=hidden, w=weight, b=batch: cce_logprobs(x, w, b)
            if has("trl"):
                runs["trl logprob"] = lambda x=hidden, w=weight, b=batch: trl_logprobs(x @ w.T, b.targets)
                runs["trl chunked"] = lambda x=hidden, w=weight, b=batch: trl_chunked(x, w, b)
        x, rounds = f"N={n},H={h},V={v}", 3 if smoke else 5

        def without_gradient(run):
            with torch.no_grad():
                run()

        alone = {name: (lambda run=run: Variant(lambda: without_gradient(run))) for name, run in runs.items()}
        compare(table, f"{KERNEL} (no grad)", x, alone, rounds=rounds, flops=2.0 * n * h * v)
        full = {
            name: (lambda run=run, leaves=(hidden, weight): Variant(lambda: run().sum(), leaves))
            for name, run in runs.items()
        }
        compare(table, KERNEL, x, full, rounds=rounds, flops=8.0 * n * h * v)
