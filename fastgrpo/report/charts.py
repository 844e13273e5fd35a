"""Charts as SVG that stretches with the page, with labels as HTML that does not.

The plot area fills its box whatever its shape (preserveAspectRatio none) and strokes keep their width, so that a
chart is sharp on a phone and on a desktop, in print, and where scripts are forbidden. The page's script only adds
reading values off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from fastgrpo.report.series import Buckets, Values, percentile, show, smooth, ticks

WIDTH, HEIGHT = 1000, 300
SMOOTH_FROM = 40
"""Buckets from which on a line is drawn thin with its smoothed course over it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a chart.

    Example: Line(label="reward", values=[0.3, 0.4], color="blue")
    """

    label: str
    values: Values
    color: str
    low: Values | None = None
    """With high: a band around the line."""
    high: Values | None = None
    dash: str = ""
    """A stroke-dasharray, so that colour is not the only difference."""
    dots: bool = False
    """Mark each value and bridge gaps: for what is measured now and then."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a figure shows."""

    title: str
    lines: list[Line]
    kind: str = "real"
    """How values are written: see series.show."""
    from_zero: bool = True
    calm: bool = True
    """Draw the smoothed course of a long series; not for what has no noise."""
    stacked: bool = False
    """Lines are heights of a stack, one bar a bucket."""
    size: str = ""
    """wide: half of the page; full: all of it; otherwise a third."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear scale from data to the plot area."""

    low: float
    high: float
    size: float
    flip: bool = False
    notes: list[str] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        """The coordinate of a value, kept near the plot area where the value is far outside."""
        share = (value - self.low) / (self.high - self.low)
        share = min(1.5, max(-0.5, share))
        return round(self.size * (1 - share if self.flip else share), 1)


def smoothing_window(num_buckets: int) -> int:
    """Buckets in a smoothed value; 1 where the run is too short for any."""
    return 1 if num_buckets < SMOOTH_FROM else max(5, num_buckets // 20) | 1


def x_axis(buckets: Buckets) -> Axis:
    """Half a step of room at either end: a run of one step has a width too."""
    return Axis(low=buckets.first[0] - 0.5, high=buckets.last[-1] + 0.5, size=WIDTH)


def render(chart: Chart, buckets: Buckets) -> str:
    """The figure, without script."""
    x, y = x_axis(buckets), _y_axis(chart, buckets)
    window = smoothing_window(len(buckets.groups)) if chart.calm else 1
    marks = _stack(chart.lines, buckets, x, y) if chart.stacked else _lines(chart.lines, buckets, x, y, window)
    notes = "; ".join(y.notes)
    y_ticks = ticks(y.low, y.high)
    x_ticks = [tick for tick in ticks(x.low, x.high, 5) if tick == int(tick)]
    grid = "".join(f'<path class="grid" d="M0 {y(tick)}H{WIDTH}"/>' for tick in y_ticks)
    y_labels = "".join(
        f'<span style="top:{100 * y(t) / HEIGHT:.1f}%">{escape(_tick(t, y_ticks, chart.kind))}</span>' for t in y_ticks
    )
    x_labels = "".join(f'<span style="left:{100 * x(t) / WIDTH:.2f}%">{int(t)}</span>' for t in x_ticks)
    return (
        f'<figure class="chart {chart.size}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<ul class="legend">{_legend(chart)}</ul></figcaption>'
        f'<div class="plot"><div class="y">{y_labels}</div><div class="area" tabindex="0" role="img" '
        f'aria-label="{escape(_summary(chart))}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true">{grid}{marks}</svg><i class="cursor"></i></div><div class="x">{x_labels}</div></div>'
        + (f'<p class="note">{escape(notes)}</p>' if notes else "")
        + "</figure>"
    )


def _lines(lines: Sequence[Line], buckets: Buckets, x: Axis, y: Axis, window: int) -> str:
    positions = [x(value) for value in buckets.x]
    out = ""
    for line in lines:
        if line.low is not None and line.high is not None:
            out += _band(line, positions, y)
    for line in lines:
        style = f'style="stroke:var(--{line.color})"'
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        points = _points(positions, line.values, y)
        if line.dots:
            found = [point for point in points if point is not None]
            out += f'<path class="line" {style}{dash} d="{_trace(found)}"/>'
            out += f'<path class="dot" {style} d="{"".join(f"M{px} {py}h0" for px, py in found)}"/>'
            continue
        course = points
        if window > 1:
            out += f'<path class="line raw" {style} d="{_trace(points)}"/>'
            course = _points(positions, smooth(line.values, window), y)
        out += f'<path class="line" {style}{dash} d="{_trace(course)}"/>'
        alone = "".join(f"M{point[0]} {point[1]}h0" for point in _isolated(points))
        if alone:
            out += f'<path class="dot" {style} d="{alone}"/>'
    return out


def _points(positions: Sequence[float], values: Values, y: Axis) -> list[tuple[float, float] | None]:
    return [None if value is None else (x, y(value)) for x, value in zip(positions, values, strict=True)]


def _band(line: Line, positions: Sequence[float], y: Axis) -> str:
    assert line.low is not None
    assert line.high is not None
    out, run = "", []
    for p, low, high in [*zip(positions, line.low, line.high, strict=True), (0.0, None, None)]:
        if low is not None and high is not None:
            run.append((p, y(low), y(high)))
        elif run:
            top = "L".join(f"{px} {high_y}" for px, _, high_y in run)
            bottom = "L".join(f"{px} {low_y}" for px, low_y, _ in reversed(run))
            out += f"M{top}L{bottom}Z"
            run = []
    return f'<path class="band" style="fill:var(--{line.color})" d="{out}"/>'


def _stack(lines: Sequence[Line], buckets: Buckets, x: Axis, y: Axis) -> str:
    edges = [(x(first - 0.5), x(last + 0.5)) for first, last in zip(buckets.first, buckets.last, strict=True)]
    floor = [0.0] * len(edges)
    out = ""
    for line in lines:
        top = [low + (value or 0.0) for low, value in zip(floor, line.values, strict=True)]
        if top != floor:
            upper = "".join(f"L{left} {y(t)}H{right}" for (left, right), t in zip(edges, top, strict=True))
            lower = "".join(
                f"L{right} {y(t)}H{left}" for (left, right), t in zip(reversed(edges), reversed(floor), strict=True)
            )
            out += f'<path class="bar" style="fill:var(--{line.color})" d="M{upper[1:]}{lower}Z"/>'
        floor = top
    return out


def _y_axis(chart: Chart, buckets: Buckets) -> Axis:
    if chart.stacked:
        totals = [
            sum(value or 0.0 for value in column) for column in zip(*(x.values for x in chart.lines), strict=True)
        ]
        series: list[Values] = [list(totals)]
    else:
        series = [values for line in chart.lines for values in (line.values, line.low, line.high) if values is not None]
    values = [value for part in series for value in part if value is not None]
    low, high, notes = min(values), max(values), []
    usual = percentile(values, 0.9 if chart.stacked else 0.97)
    if len(values) >= 10 and usual > 0 and high > 2.5 * usual:  # one spike must not flatten the rest
        at = next(i for part in series for i, value in enumerate(part) if value == high)
        first, last = buckets.first[at], buckets.last[at]
        where = f"step {first}" if first == last else f"steps {first}–{last}"
        notes.append(f"peak of {show(high, chart.kind)} at {where} not to scale")
        high = usual * 1.5
    if chart.from_zero and low >= 0:
        low = 0.0
    elif high > low:
        low -= 0.05 * (high - low)
    if high - low <= 1e-9 * abs(high):
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    return Axis(low=low, high=high + 0.05 * (high - low), size=HEIGHT, flip=True, notes=notes)


def _trace(points: Sequence[tuple[float, float] | None]) -> str:
    """A path through the points that is broken where there is none."""
    out, joined = "", False
    for point in points:
        if point is not None:
            out += f"{'L' if joined else 'M'}{point[0]} {point[1]}"
        joined = point is not None
    return out


def _isolated(points: Sequence[tuple[float, float] | None]) -> list[tuple[float, float]]:
    """Points without a neighbour: a line alone would not show them."""
    padded = [None, *points, None]
    return [
        point
        for before, point, after in zip(padded, padded[1:], padded[2:], strict=False)
        if point is not None and before is None and after is None
    ]


def _tick(value: float, all_ticks: Sequence[float], kind: str) -> str:
    scale, unit = (100, " %") if kind == "percent" else (1, " s" if kind == "seconds" else "")
    largest = scale * max(map(abs, all_ticks))
    if value == 0 or largest >= 1e4 or largest < 1e-3:
        return show(value, "real") + unit
    for decimals in range(6):  # all of an axis with the decimals that its ticks need
        if all(abs(round(scale * tick, decimals) - scale * tick) < 1e-7 for tick in all_ticks):
            break
    return f"{scale * value:.{decimals}f}{unit}"


def last_value(line: Line) -> float | None:
    """The last value that was measured."""
    return next((value for value in reversed(line.values) if value is not None), None)


def _legend(chart: Chart) -> str:
    return "".join(
        f'<li><i style="--swatch:var(--{line.color})"{" class=dashed" if line.dash else ""}></i>{escape(line.label)} '
        f"<output>{show(last_value(line), chart.kind)}</output></li>"
        for line in chart.lines
    )


def _summary(chart: Chart) -> str:
    parts = []
    for line in chart.lines:
        known = [value for value in line.values if value is not None]
        if known:
            parts.append(f"{line.label} from {show(known[0], chart.kind)} to {show(known[-1], chart.kind)}")
    return f"{chart.title}: {', '.join(parts)}"
