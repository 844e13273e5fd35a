"""Everything this project wants to know from a GPU, in one command and under nine minutes.

    python benchmarks/gpu.py              correctness on the device, then benchmarks, table and plot
    python benchmarks/gpu.py --smoke      the same code in seconds, on a CPU, at sizes that measure nothing

    python benchmarks/gpu.py --only policy_loss logprobs    these benchmarks alone, unchecked: for tuning
    python benchmarks/gpu.py --budget 300                   in five minutes: what no longer fits is named and left out

Writes results/<GPU>-<commit>.csv, benchmark by benchmark, and .png. Correctness first: what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bench_attention
import bench_decoder_layer
import bench_group_advantages
import bench_linear_logprobs
import bench_linear_policy_loss
import bench_logprobs
import bench_policy_loss
import torch
from harness import RESULTS, Table, copy_bandwidth
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.logprobs import logprobs
from fastgrpo.kernels.objective import LossInputs, Objective
from fastgrpo.kernels.policy_loss import policy_loss
from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.verify import VerifyConfig, run
from fastgrpo.verify.cases import OBJECTIVES, make_case
from fastgrpo.verify.layers import layout
from fastgrpo.verify.table import Check, report

BUDGET_S = 520
GRACE_S = 15
"""What a measurement that has begun may take beyond the budget, before the run ends without it."""
BENCHMARKS = (
    bench_linear_policy_loss,
    bench_policy_loss,
    bench_logprobs,
    bench_linear_logprobs,
    bench_group_advantages,
    bench_attention,
    bench_decoder_layer,
)
APART = (bench_attention, bench_decoder_layer)
"""What is wrong in one of these is wrong there alone; their checks' names begin with the kernel's."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any device, results in --out only")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="time these alone and check nothing")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="CSV to write; the plot lies beside it")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device: `make gpu` measures on a GPU; --smoke only shows that the code runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    table = Table(device, deadline=started + args.budget)
    gpu = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "smoke"
    path = args.out or RESULTS / f"{gpu}-{table.commit}.csv"
    end_at(table.deadline + GRACE_S, table, path)
    failures = [] if args.only else correctness(device, smoke=args.smoke)
    chosen = [module for module in BENCHMARKS if not args.only or module.KERNEL in args.only]
    if failures:
        print(f"correctness failed: {', '.join(failures)}")
        wrong = {next((m for m in APART if name.startswith(m.KERNEL)), None) for name in failures}
        chosen = [module for module in chosen if not wrong & {None, module}]
    if chosen:
        copy_bandwidth(table, 1 << 16 if args.smoke else 1 << 32)
    for module in chosen:
        try:
            module.bench(table, smoke=args.smoke)
        finally:
            table.write(path)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if table.rows:
        plot(table, path.with_suffix(".png"))
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if failures else 0


def end_at(when: float, table: Table, path: Path) -> None:
    """End the process at that time, with the table as it is: a kernel that hangs cannot be told to stop."""

    def end() -> None:
        print("the time is up: ended inside a measurement", flush=True)
        table.write(path)
        os._exit(2)

    timer = threading.Timer(max(when - time.monotonic(), 0.0), end)
    timer.daemon = True
    timer.start()


def correctness(device: torch.device, *, smoke: bool) -> list[str]:
    """Names of what is wrong on the device: the oracle suite, indices beyond 2^31, more than 65535 rows."""
    checks = {
        "oracle": report(list(oracle(device, smoke=smoke))) == 0,
        "more than 2^31 logits": far_rows(device, *((70, 61) if smoke else (16384, 151936))),
        "more than 65535 rows": far_rows(device, *((70, 61) if smoke else (70000, 131))),
        "bitwise repetition": repeats(device, *((70, 61) if smoke else (4096, 32001))),
        "no host synchronisation": never_waits(device),
    }
    found = {bench_decoder_layer.KERNEL: bench_decoder_layer.wrong(device, smoke=smoke)}
    for name in bench_attention.kernels(device):
        found[f"{bench_attention.KERNEL} of {name or 'a CPU'}"] = bench_attention.wrong(device, name)
    print(*(f"{name}: {what}" for name, each in found.items() for what in each), sep="\n", end="")
    checks |= {name: not each for name, each in found.items()}
    for name, ok in checks.items():
        print(f"{name:<32} {'ok' if ok else 'WRONG'}")
    return [name for name, ok in checks.items() if not ok]


def oracle(device: torch.device, *, smoke: bool) -> Iterator[Check]:
    """The oracle suite in processes of their own: its 160 kernels take minutes to compile one after the other."""
    dtypes = ("float32",) if smoke else ("float32", "bfloat16", "float16")
    sizes = {"num_tokens": 16, "hidden_size": 8, "vocab_size": 60} if smoke else {}
    tasks = [
        (VerifyConfig(device=device.type, dtypes=(dtype,), **sizes), name) for dtype in dtypes for name in OBJECTIVES
    ]
    workers = max(1, min(len(tasks), (os.cpu_count() or 1) * 3 // 4))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for checks in pool.map(checks_of, tasks):
            yield from checks


def checks_of(task: tuple[VerifyConfig, str]) -> list[Check]:
    """The suite for one objective."""
    config, name = task
    torch.set_num_threads(1)
    return list(run(config, {name: OBJECTIVES[name]}))


def far_rows(device: torch.device, num_rows: int, num_columns: int) -> bool:
    """The first and last rows of large logits agree with those rows alone in float64: logprobs, and a loss in place."""
    torch.manual_seed(0)
    logits = torch.randn(num_rows, num_columns, device=device, dtype=torch.bfloat16).requires_grad_()
    ones = torch.ones(num_rows, device=device)
    batch = LossInputs(
        targets=torch.randint(0, num_columns, (num_rows,), device=device),
        advantages=torch.randn(num_rows, device=device),
        token_weights=ones,
        old_logprobs=-10.0 * ones,
    )
    objective = Objective(entropy_coef=0.01)
    ends = [(0, 32), (num_rows - 32, num_rows)]  # of a few rows, single roundings would be the norm
    exact = [logits[slice(*end)].detach().double().requires_grad_() for end in ends]

    log_p, entropy = logprobs(logits, batch.targets, entropy=True)
    (grad,) = torch.autograd.grad(log_p.sum() + entropy.sum(), logits)
    for end, rows in zip(ends, exact, strict=True):
        want, want_entropy = reference.logprobs(rows, batch.targets[slice(*end)], entropy=True)
        (want_grad,) = torch.autograd.grad(want.sum() + want_entropy.sum(), rows)
        if not agree(log_p[slice(*end)], want, grad[slice(*end)], want_grad):
            return False
    del grad
    overwritten = logits.detach().requires_grad_()
    out = policy_loss(overwritten, batch, objective, in_place=True)
    (grad,) = torch.autograd.grad(out.loss, overwritten)
    for end, rows in zip(ends, exact, strict=True):
        want_out = reference.policy_loss(rows, batch.tokens_from(*end), objective)
        (want_grad,) = torch.autograd.grad(want_out.loss, rows)
        if not agree(out.logprobs[slice(*end)], want_out.logprobs, grad[slice(*end)], want_grad):
            return False
    return True


def agree(log_p: Tensor, want: Tensor, grad: Tensor, want_grad: Tensor) -> bool:
    close = torch.allclose(log_p.double(), want, atol=2e-5, rtol=0.0)
    return close and bool((grad.double() - want_grad).norm() <= 3e-3 * want_grad.norm())


def repeats(device: torch.device, num_rows: int, num_columns: int) -> bool:
    """The same call twice gives the same bits."""
    logits = torch.randn(num_rows, num_columns, device=device, dtype=torch.bfloat16).requires_grad_()
    ones = torch.ones(num_rows, device=device)
    batch = LossInputs(
        targets=torch.randint(0, num_columns, (num_rows,), device=device),
        advantages=torch.randn(num_rows, device=device),
        token_weights=ones / num_rows,
        old_logprobs=-10.0 * ones,
    )
    runs = []
    for _ in range(2):
        loss = policy_loss(logits, batch, Objective(entropy_coef=0.01)).loss
        runs.append((loss, *torch.autograd.grad(loss, logits)))
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def never_waits(device: torch.device) -> bool:
    """A training step through attention and the head, token and sequence ratios, makes the host wait for nothing."""
    problems = [
        (make_case(num_tokens=96, hidden_size=64, vocab_size=1000, dtype=torch.bfloat16, device=device.type), objective)
        for objective in (Objective(kl_coef=0.1, entropy_coef=0.01), Objective(ratio_level="sequence"))
    ]
    plan = SegmentPlan(layout([(20, [40, 36])]), device)
    q, k, v = (torch.randn(96, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    for strict in (False, True):  # compile first
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            segment_attention(q, k, v, plan, scale=0.125).sum().backward()
            for case, objective in problems:
                linear_policy_loss(case.hidden, case.weight, case.batch, objective, chunk_size=40).loss.backward()
        except RuntimeError as error:
            print(error)
            return False
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return True


def plot(table: Table, path: Path) -> None:
    """Full times of every provider, a panel per kernel and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in table.rows if r["metric"] == "time" and r["mode"] in ("full", "forward")]
    panels: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:  # a full time replaces the forward time listed before it
        panels.setdefault(f"{row['kernel']} {row['x']}", {})[row["provider"]] = row
    heights = [len(providers) + 1 for providers in panels.values()]
    size = (9, 0.35 * sum(heights) + 0.6 * len(heights))
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, figsize=size, height_ratios=heights, layout="constrained"
    )
    for axis, (title, providers) in zip(axes[:, 0], panels.items(), strict=True):
        p50, p20, p80 = ([float(row[name]) for row in providers.values()] for name in ("p50", "p20", "p80"))
        spread = [[m - low for m, low in zip(p50, p20, strict=True)], [h - m for h, m in zip(p80, p50, strict=True)]]
        bars = axis.barh(list(providers), p50, xerr=spread, color="#4477aa", ecolor="#222222", capsize=2)
        axis.bar_label(bars, fmt="%.3g", padding=6)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms, median with 20th and 80th percentile")
    figure.suptitle(f"{table.rows[0]['gpu']}, {table.rows[0]['commit']}")
    figure.savefig(path, dpi=120)
    print(f"plot written to {path}")


if __name__ == "__main__":
    sys.exit(main())
