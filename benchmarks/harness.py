"""How every kernel is timed, and the one tidy table that all results go into.

Variants of one case take turns, so that a machine that slows down slows all of them; medians with the 20th and
80th percentile are kept. On a GPU times come from device events; on a CPU, where benchmarks only smoke-test
themselves, from the host's clock. A peer that fails or runs out of memory is reported as absent, not as slow.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "gpu", "commit", "timestamp", "versions",
)  # fmt: skip
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl")


@dataclass(frozen=True)
class Variant:
    """One provider's work. forward returns what backward differentiates; leaves are cleared between runs."""

    forward: Callable[[], Tensor | tuple[Tensor, ...] | None]
    leaves: tuple[Tensor, ...] = ()
    grads: tuple[Tensor, ...] | None = None
    """Of what forward returns; None where that is one number."""


@dataclass
class Table:
    """Rows for the CSV, filled by the benchmarks and printed as they come."""

    device: torch.device
    deadline: float = float("inf")
    rows: list[dict[str, str]] = field(default_factory=list)
    copy_rate: float | None = None
    """GB/s of a copy, read plus written: what bandwidths are compared with."""

    def __post_init__(self) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "none (CPU smoke test)"
        self.commit = _commit()
        self._constant = {"gpu": name, "commit": self.commit, "versions": _versions()}

    def add(
        self, kernel: str, provider: str, mode: str, metric: str, unit: str, x: str, values: Iterable[float]
    ) -> None:
        """A metric's median and percentiles over its values."""
        p20, p50, p80 = percentiles(list(values))
        row = {"kernel": kernel, "provider": provider, "mode": mode, "metric": metric, "unit": unit, "x": x}
        numbers = {"p50": f"{p50:.6g}", "p20": f"{p20:.6g}", "p80": f"{p80:.6g}"}
        stamp = {"timestamp": datetime.now(UTC).isoformat(timespec="seconds")}
        self.rows.append(row | numbers | self._constant | stamp)
        print(f"{kernel:<20} {provider:<24} {mode:<9} {metric:<12} {p50:>12.5g} {unit:<6} {x}", flush=True)

    def write(self, path: Path, *, append: bool = False) -> None:
        """All rows as CSV; append: behind those that the file has."""
        path.parent.mkdir(parents=True, exist_ok=True)
        goes_on = append and path.exists()
        with path.open("a" if goes_on else "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not goes_on:
                writer.writeheader()
            writer.writerows(self.rows)
        print(f"{len(self.rows)} rows written to {path}")

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """(p20, p50, p80)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def compare(
    table: Table,
    kernel: str,
    x: str,
    variants: dict[str, Callable[[], Variant]],
    *,
    rounds: int = 10,
    bytes_moved: float | None = None,
    flops: float | None = None,
) -> dict[str, float]:
    """Time forward, backward and full of every variant in turns; record times, memory and achieved rates.

    Returns the median full time in ms of the variants that ran.
    """
    ready = {}
    for name, build in variants.items():
        if table.out_of_time():
            print(f"{kernel} {name} {x}: left out, the time is up")
            continue
        variant = build()
        try:
            peak = _peak_memory(variant, table.device)  # also compiles and warms up
        except Exception as error:
            _leave_out(f"{kernel} {name} {x}", name, variant, error, table.device)
            continue
        ready[name] = variant
        if peak is not None:
            table.add(kernel, name, "full", "peak_memory", "bytes", x, [peak])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, variant in list(ready.items()):
            try:
                times[name].append(_timed(variant, table.device))
            except Exception as error:  # for example memory that another has left in pieces
                _leave_out(f"{kernel} {name} {x}", name, variant, error, table.device)
                del ready[name], times[name]
        if table.out_of_time():
            break
    medians = {}
    for name, pairs in times.items():
        differentiates = bool(ready[name].leaves)
        modes = {"forward": [f for f, _ in pairs]}
        if differentiates:
            modes |= {"backward": [b for _, b in pairs], "full": [f + b for f, b in pairs]}
        for mode, values in modes.items():
            table.add(kernel, name, mode, "time", "ms", x, values)
        whole = modes["full" if differentiates else "forward"]
        medians[name] = statistics.median(whole)
        if bytes_moved:
            rates = [bytes_moved / t / 1e6 for t in whole]
            table.add(kernel, name, "full", "bandwidth", "GB/s", x, rates)
            if table.copy_rate is not None:
                table.add(kernel, name, "full", "of_copy", "ratio", x, [rate / table.copy_rate for rate in rates])
        if flops:
            table.add(kernel, name, "full", "rate", "TFLOP/s", x, [flops / t / 1e9 for t in whole])
    return medians


def _leave_out(what: str, name: str, variant: Variant, error: Exception, device: torch.device) -> None:
    """Other people's code, at sizes they may not have tried, is absent and said to be; our own must run."""
    if name.startswith("fastgrpo"):
        raise error
    print(f"{what}: failed with {type(error).__name__}: {str(error)[:200]}")
    _clear(variant)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(variant: Variant, device: torch.device) -> tuple[float, float]:
    """(forward, backward) in ms."""
    _clear(variant)
    if device.type != "cuda":
        start = time.perf_counter()
        out = variant.forward()
        middle = time.perf_counter()
        _backward(variant, out)
        return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize(device)
    marks[0].record()
    out = variant.forward()
    marks[1].record()
    _backward(variant, out)
    marks[2].record()
    torch.cuda.synchronize(device)
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def _backward(variant: Variant, out: Tensor | tuple[Tensor, ...] | None) -> None:
    if variant.leaves and out is not None:
        torch.autograd.backward(out, variant.grads)


def _peak_memory(variant: Variant, device: torch.device) -> int | None:
    """Bytes allocated beyond the inputs, on the second run (the first may compile)."""
    for _ in range(2):
        _clear(variant)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        _backward(variant, variant.forward())
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def _clear(variant: Variant) -> None:
    for leaf in variant.leaves:
        leaf.grad = None


def copy_bandwidth(table: Table, num_bytes: int) -> None:
    """The table's copy_rate, from a device-to-device copy of that many bytes."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=table.device)
    target = torch.empty_like(source)
    variants = {"copy": lambda: Variant(lambda: target.copy_(source))}
    milliseconds = compare(table, "copy", f"bytes={num_bytes}", variants, bytes_moved=2.0 * num_bytes)
    table.copy_rate = 2.0 * num_bytes / milliseconds["copy"] / 1e6


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except OSError:  # a lent machine may have no git
        return "unknown"
    return result.stdout.strip() or "unknown"


def _versions() -> str:
    found = [f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(found)
