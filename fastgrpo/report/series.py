"""From rows of metrics.jsonl to series short enough to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Values = list[float | None]
"""One value a bucket; None where nothing finite was measured."""

MAX_BUCKETS = 400
"""More points than this a chart cannot show; a longer run has several steps in a bucket."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """A run's rows in consecutive groups of equal size, so that every chart shares one x axis.

    Example: rows of steps 0 to 999 in 334 buckets of 3; buckets[1] holds steps 3, 4 and 5.
    """

    groups: list[list[Row]]
    per_bucket: int

    @property
    def first(self) -> list[int]:
        """Each bucket's first step."""
        return [int(group[0]["step"]) for group in self.groups]

    @property
    def last(self) -> list[int]:
        """Each bucket's last step."""
        return [int(group[-1]["step"]) for group in self.groups]

    @property
    def x(self) -> list[float]:
        """Where a bucket stands on the x axis."""
        return [(first + last) / 2 for first, last in zip(self.first, self.last, strict=True)]

    def mean(self, key: str) -> Values:
        """The mean of a metric in each bucket."""
        return self._each(key, lambda values: sum(values) / len(values))

    def low(self, key: str) -> Values:
        """The least value in each bucket."""
        return self._each(key, min)

    def high(self, key: str) -> Values:
        """The greatest value in each bucket."""
        return self._each(key, max)

    def _each(self, key: str, reduce: Callable[[list[float]], float]) -> Values:
        picked = ([x for row in group if (x := number(row.get(key))) is not None] for group in self.groups)
        return [reduce(values) if values else None for values in picked]


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of their steps, those of the same step made one; their times add up."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        into = merged.setdefault(int(step), {"step": int(step)})
        for key, value in row.items():
            if key.startswith("time/") and number(into.get(key)) is not None:
                into[key] += number(value) or 0.0
            elif key != "step":
                into[key] = value
    return [merged[step] for step in sorted(merged)]


def make_buckets(rows: Sequence[Row], max_buckets: int = MAX_BUCKETS) -> Buckets:
    """Consecutive rows in at most max_buckets groups."""
    per_bucket = max(1, math.ceil(len(rows) / max_buckets))
    groups = [list(rows[start : start + per_bucket]) for start in range(0, len(rows), per_bucket)]
    return Buckets(groups=groups, per_bucket=per_bucket)


def number(value: object) -> float | None:
    """The value as a finite float that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e100 < value < 1e100:
        return None
    return float(value)


def column(rows: Iterable[Row], key: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a metric where it was measured and finite."""
    return [(row["step"], x) for row in rows if (x := number(row.get(key))) is not None]


def smooth(values: Values, window: int) -> Values:
    """Centred mean over `window` buckets without the least and the greatest, so that one spike stays one spike.

    Fewer buckets at the ends; gaps stay gaps.
    """
    half = window // 2
    out: Values = []
    for i, value in enumerate(values):
        near = sorted(x for x in values[max(0, i - half) : i + half + 1] if x is not None)
        kept = near[1:-1] if len(near) >= 3 else near
        out.append(None if value is None else sum(kept) / len(kept))
    return out


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which that share of the values lies (nearest rank); of at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1 if share > 0 else 0)]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high]; low < high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def show(value: float | None, kind: str) -> str:
    """A value for people. kind: real | percent | count | seconds. The page's script has the same rules."""
    if value is None:
        return "–"
    if kind == "percent":
        return f"{100 * value:.{2 if value != 0 and abs(value) < 0.01 else 1}f} %"
    if kind == "seconds":
        return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"
    size = abs(value)
    if kind == "count" or size >= 1e5:
        for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
            if size >= scale:
                return f"{value / min(scale, 1e3 if unit == 'k' else scale):.1f}{unit}"
        return f"{value:.0f}" if size >= 100 or value == int(value) else f"{value:.1f}"
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4f}" if size < 0.1 else f"{value:.3f}" if size < 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Wall time for people: 42.1 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"
