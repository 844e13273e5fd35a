"""float32 linear layers on this machine's CPU: fastgrpo's (oneDNN) against torch's own (MKL), forward and backward.

    python benchmarks/bench_cpu_linear.py [--threads 2]

The shapes are those of benchmarks/bench_step.py's model at 4608 packed tokens and at one decoding step of 64 rows.
Operations: 2 M K N forward, 4 M K N backward.
"""

from __future__ import annotations

import argparse

import torch
from harness import RESULTS, Table, Variant, compare

from fastgrpo.kernels.cpu_linear import is_available, linear

SHAPES = ((4608, 256, 1024), (4608, 1024, 256), (4608, 256, 256), (64, 256, 1024))


def bench(table: Table) -> None:
    for m, k, n in SHAPES:
        x, weight = (torch.randn(shape, requires_grad=True) for shape in ((m, k), (n, k)))
        grad = torch.randn(m, n)
        runs = {
            name: lambda f=f, x=x, weight=weight, grad=grad: Variant(lambda: (f(x, weight) * grad).sum(), (x, weight))
            for name, f in (("fastgrpo", linear), ("torch", torch.nn.functional.linear))
        }
        compare(table, "cpu_linear", f"M={m},K={k},N={n}", runs, rounds=30, flops=6.0 * m * k * n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    assert is_available(), "this build of torch holds no oneDNN"
    table = Table(torch.device("cpu"))
    bench(table)
    table.write(RESULTS / "cpu_linear.csv")


if __name__ == "__main__":
    main()
