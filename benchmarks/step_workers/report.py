"""From the measured steps to a table for people and a tidy CSV."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from step_workers.case import Case
from step_workers.floor import step_flops
from step_workers.gate import Ready, StepReport

VALUE_COLUMNS = ("kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "versions")
# The kernels' benchmarks write the same columns (harness.py); here `gpu` names the processor that ran.
COLUMNS = (*VALUE_COLUMNS[:-1], "gpu", "commit", "timestamp", "versions")
PARTS = ("generate", "reward", "logprobs", "update", "other")
OURS, THEIRS = "fastgrpo", "trl"
MB = 1e6
Quantiles = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case's counted steps by provider; `gemm` holds the rates of the matrix products of each round."""

    case: Case
    steps: dict[str, list[StepReport]]
    ready: dict[str, Ready]

    @property
    def providers(self) -> list[str]:
        return [provider for provider in self.steps if provider != "gemm"]

    def seconds(self, provider: str, part: str | None = None) -> list[float]:
        """Of every counted step: the whole of it, or one part (0 where the provider has no such part)."""
        return [step.seconds if part is None else step.parts.get(part, 0.0) for step in self.steps[provider]]

    def ratios(self) -> dict[str, tuple[float, Quantiles]]:
        """How many times longer TRL takes than each of ours: the ratio of the medians, and the quantiles over the pairs
        of a round. Nothing where TRL was not measured."""
        found = {}
        for provider in self.providers if THEIRS in self.providers else ():
            if provider != THEIRS:
                ours, theirs = self.seconds(provider), self.seconds(THEIRS)
                pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
                found[provider] = quantiles(theirs)[0] / quantiles(ours)[0], quantiles(pairs)
        return found

    def memory(self, provider: str) -> tuple[int, int]:
        """(peak bytes of the process, what of it came after imports and set-up)."""
        peak = self.steps[provider][-1].peak_rss_bytes
        return peak, peak - self.ready[provider].rss_bytes

    def rate(self, where: str) -> Quantiles:
        """GFLOP/s of the model's matrix products: update, decode (few rows), or either with _torch (torch.mm alone)."""
        return quantiles(step.counts[f"{where}_mflops"] / 1e3 for step in self.steps["gemm"])

    def floor(self) -> dict[str, float]:
        """Seconds that each part's matrix products take at the update's rate."""
        return {part: flops / 1e9 / self.rate("update")[0] for part, flops in step_flops(self.case).items()}


def quantiles(values: Iterable[float]) -> Quantiles:
    """(median, 20th, 80th percentile), interpolated linearly."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.5), at(0.2), at(0.8)


# --- for people -------------------------------------------------------------------------------------------------------


def table(measured: Measured) -> str:
    """Both sides' times, memory and tokens, their ratio, and how far ours is from the floor."""
    case, providers = measured.case, measured.providers
    lines = [
        f"{case.prompt_length}-token prompts: {case.prompts_per_step} x {case.group_size} completions of "
        f"{case.new_tokens} tokens, {len(measured.steps[providers[0]])} steps, median [p20 .. p80]",
        _line("", [f"{p} {measured.ready[p].version}" for p in providers]),
        _line("step, s", [_seconds(measured.seconds(p)) for p in providers]),
        *(_line(f"  {part}", [_seconds(measured.seconds(p, part)) for p in providers]) for part in PARTS),
        _line(
            "tokens a second", [f"{case.sequence_tokens / quantiles(measured.seconds(p))[0]:,.0f}" for p in providers]
        ),
        _line("rows in the learner", [f"{measured.steps[p][-1].counts['learner_rows']:,}" for p in providers]),
        _line("peak memory, MB", [f"{measured.memory(p)[0] / MB:.0f}" for p in providers]),
        _line("  after set-up, MB", [f"+{measured.memory(p)[1] / MB:.0f}" for p in providers]),
    ]
    lines += [
        f"{provider} is {medians:.2f} x as fast (medians); pair by pair {p50:.2f} [{p20:.2f} .. {p80:.2f}] x"
        for provider, (medians, (p50, p20, p80)) in measured.ratios().items()
    ]
    if OURS in providers:
        lines += _ledger(measured)
    return "\n".join(lines) + "\n"


def _ledger(measured: Measured) -> list[str]:
    """Where our step's time goes, beside the floor."""
    floor, whole = measured.floor(), quantiles(measured.seconds(OURS))[0]
    least = sum(floor.values())
    gflops = sum(step_flops(measured.case).values()) / 1e9
    rate, plain, decode_rate = (measured.rate(where)[0] for where in ("update", "update_torch", "decode"))
    lines = [
        f"floor: {gflops:.1f} GFLOP of fp32 matrix products at {rate:.0f} GFLOP/s, the best this machine does on this "
        f"model's shapes, = {least:.3f} s; fastgrpo reaches {100 * least / whole:.0f} % of it",
        f"  torch.mm alone does {plain:.0f} GFLOP/s, which makes {gflops / plain:.3f} s; {measured.case.num_sequences} "
        f"rows at a time, as decoding has them, the best is {decode_rate:.0f} GFLOP/s",
        _line("fastgrpo, s", ["spent", "floor", "above it", "share of step"]),
    ]
    for part in PARTS:
        spent, matrices = quantiles(measured.seconds(OURS, part))[0], floor.get(part, 0.0)
        cells = [f"{spent:.3f}", f"{matrices:.3f}", f"{spent - matrices:.3f}", f"{100 * spent / whole:.0f} %"]
        lines.append(_line(f"  {part}", cells))
    return lines


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>26}" for cell in cells)


def _seconds(values: list[float]) -> str:
    p50, p20, p80 = quantiles(values)
    return f"{p50:.3f} [{p20:.3f} .. {p80:.3f}]"


# --- for machines -----------------------------------------------------------------------------------------------------


def rows(measured: Measured) -> list[dict[str, object]]:
    """Tidy rows; x is the prompt's length in tokens, and a value that was not sampled has equal quantiles."""
    found: list[dict[str, object]] = []
    torch_version = f"torch {measured.ready['gemm'].version}"

    def add(provider: str, mode: str, metric: str, unit: str, values: float | Quantiles) -> None:
        values = values if isinstance(values, tuple) else (values,) * 3
        named = [p for p in measured.providers if p in provider.split("/")]
        version = ", ".join([*(f"{p} {measured.ready[p].version}" for p in named), torch_version])
        cells = ("grpo_step", provider, mode, metric, unit, measured.case.prompt_length, *values, version)
        found.append(dict(zip(VALUE_COLUMNS, cells, strict=True)))

    for provider in measured.providers:
        add(provider, "full", "time", "s", quantiles(measured.seconds(provider)))
        for part in PARTS:
            add(provider, part, "time", "s", quantiles(measured.seconds(provider, part)))
        peak, grown = measured.memory(provider)
        add(provider, "full", "peak_rss", "MB", peak / MB)
        add(provider, "full", "peak_rss_after_setup", "MB", grown / MB)
        for name, count in measured.steps[provider][-1].counts.items():
            add(provider, "full", name, "tokens", float(count))
    for provider, (medians, pairs) in measured.ratios().items():
        add(f"trl/{provider}", "full", "speedup_of_medians", "x", medians)
        add(f"trl/{provider}", "full", "speedup_of_pairs", "x", pairs)
    for where in ("update", "update_torch", "decode", "decode_torch"):
        add("gemm", where, "matrix_rate", "GFLOP/s", measured.rate(where))
    for part, flops in step_flops(measured.case).items():
        add("floor", part, "matrix_work", "GFLOP", flops / 1e9)
        add("floor", part, "time", "s", measured.floor()[part])
    if OURS in measured.providers:
        share = sum(measured.floor().values()) / quantiles(measured.seconds(OURS))[0]
        add(OURS, "full", "share_of_floor", "%", 100 * share)
    return found


def write_csv(path: Path, found: list[dict[str, object]], machine: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in found:
            numbers = {name: f"{row[name]:.6g}" for name in ("p50", "p20", "p80")}
            writer.writerow({**row, **numbers, **machine})


def machine() -> dict[str, str]:
    """What the numbers belong to: processor and threads, time, commit (marked where files differ from it)."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "gpu": f"{_processor()}, {threads} threads",
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip() or "unknown",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
