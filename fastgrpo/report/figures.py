"""Which figures a report has, from whichever metrics a run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from fastgrpo.metrics import PARTS
from fastgrpo.report.charts import Chart, Line
from fastgrpo.report.series import Buckets, Row, Values, column, duration, number, show

PART_COLORS = dict(
    zip((*PARTS, "other"), ("blue", "brown", "orange", "sky", "green", "yellow", "red", "purple", "gray"), strict=True)
)
PART_MEANINGS = {
    "generate": "sampling completions",
    "environment": "waiting for the environment",
    "reward": "scoring them",
    "logprobs": "old and reference logprobs",
    "update": "forward, backward, optimizer",
    "share": "weights and memory between learner and sampler",
    "checkpoint": "saving",
    "eval": "held-out evaluation",
    "other": "everything else",
}
# title, kind, from_zero, (label, key) pairs
PLAIN_CHARTS: list[tuple[str, str, bool, list[tuple[str, str]]]] = [
    ("KL to the reference", "real", True, [("KL", "kl")]),
    ("Entropy", "real", True, [("entropy", "entropy")]),
    ("Truncated completions", "percent", True, [("cut at the limit", "truncated_fraction")]),
    ("Turns of the policy", "real", True, [("mean", "turns/mean"), ("longest conversation", "turns/max")]),
    ("Groups of equal rewards", "percent", True, [("no signal", "groups/constant_fraction")]),
    (
        "Clipped tokens",
        "percent",
        True,
        [("all", "clip_fraction"), ("low", "clip_fraction/low"), ("high", "clip_fraction/high")],
    ),
    ("Gradient norm, before clipping", "real", True, [("norm", "grad_norm")]),
    ("Learning rate", "real", True, [("rate", "learning_rate")]),
    ("Sampler against learner", "real", True, [("mean |Δ logprob|", "sampler_mismatch/mean_abs")]),
    ("Loss", "real", False, [("loss", "loss")]),
    ("Throughput", "count", True, [("tokens/s", "tokens_per_second")]),
    ("Updates' arithmetic, of what the devices could do (MFU)", "percent", True, [("MFU", "mfu")]),
    (
        "Memory held at the end of a phase, bytes",
        "count",
        True,
        [("learning", "memory/train_end_bytes"), ("sampling", "memory/rollout_end_bytes")],
    ),
]
LINE_STYLES = [("blue", ""), ("orange", "6 4"), ("green", "2 4"), ("purple", "8 3 2 3"), ("red", "1 3")]
HANDLED = {
    "step",
    "tokens",
    "tflop",
    "reward/mean",
    "reward/std",
    "response_length/mean",
    "response_length/min",
    "response_length/max",
    *(key for _, _, _, pairs in PLAIN_CHARTS for _, key in pairs),
}
MAX_FURTHER = 30


def main_charts(buckets: Buckets) -> list[Chart]:
    """The charts that every reader looks at, less those without a value."""
    leading = [chart for chart in (_reward(buckets), _accuracy(buckets)) if chart.lines]
    if len(leading) == 1:
        leading = [replace(leading[0], size="full")]
    charts = [*leading, _length(buckets)]
    for title, kind, from_zero, pairs in PLAIN_CHARTS:
        lines = [
            _line(buckets, key, label, color, dash, ranged=len(pairs) == 1)
            for (label, key), (color, dash) in zip(pairs, LINE_STYLES, strict=False)
        ]
        calm = title != "Learning rate"
        charts.append(Chart(title=title, lines=_measured(lines), kind=kind, from_zero=from_zero, calm=calm))
    return [chart for chart in charts if chart.lines]


def further_charts(buckets: Buckets) -> list[Chart]:
    """A chart for each metric that has no place of its own: reward terms, a user's own numbers."""
    keys = dict.fromkeys(key for group in buckets.groups for row in group for key in row)
    own = [key for key in keys if key not in HANDLED and not key.startswith(("time/", "eval/"))]
    accuracies = _accuracy_keys(buckets)[: len(LINE_STYLES)]
    own += [key for key in keys if key.startswith("eval/") and key not in accuracies]
    charts = [
        Chart(title=key, lines=_measured([_line(buckets, key, "")]), from_zero=False) for key in own[:MAX_FURTHER]
    ]
    return [chart for chart in charts if chart.lines]


def ledger_chart(buckets: Buckets) -> Chart | None:
    """Seconds a step, part upon part."""
    lines = [
        Line(label=part, values=buckets.mean(f"time/{part}_s"), color=color) for part, color in PART_COLORS.items()
    ]
    lines = [line for line in lines if any(line.values)]
    return Chart(title="Seconds a step", lines=lines, kind="seconds", stacked=True, size="full") if lines else None


def ledger_table(rows: Sequence[Row]) -> str:
    """Time by part over the whole run, and whether the parts add up to it."""
    timed = [row for row in rows if number(row.get("time/total_s")) is not None]
    if not timed:
        return ""
    spent = {part: sum(number(row.get(f"time/{part}_s")) or 0.0 for row in timed) for part in PART_COLORS}
    total, parts = sum(number(row["time/total_s"]) or 0.0 for row in timed), sum(spent.values())
    num_steps = max(1, sum(1 for row in timed if row["step"] > 0))
    body = "".join(
        f'<tr style="--swatch:var(--{PART_COLORS[part]})"><td><i class="key"></i>{part}</td>'
        f"<td>{PART_MEANINGS[part]}</td><td>{duration(seconds)}</td><td>{show(seconds / num_steps, 'seconds')}</td>"
        f'<td>{show(seconds / (total or 1), "percent")}</td><td class="share"><i class="fill" '
        f'style="width:{100 * seconds / (total or 1):.2f}%"></i></td></tr>'
        for part, seconds in spent.items()
        if seconds > 0
    )
    return (
        '<div class="scroll"><table><thead><tr><th>part</th><th></th><th>time</th><th>a step</th><th>share</th>'
        f"<th></th></tr></thead><tbody>{body}</tbody><tfoot><tr><td>total</td><td></td><td>{duration(parts)}</td>"
        f"<td>{show(parts / num_steps, 'seconds')}</td><td>{show(parts / (total or 1), 'percent')}</td><td></td></tr>"
        "</tfoot></table></div>"
        f'<p class="note">{escape(_balance(parts, total))}</p>'
    )


def _balance(parts: float, total: float) -> str:
    # The rows hold whole nanoseconds; only adding thousands of floats rounds.
    if abs(parts - total) <= 1e-9 * max(1.0, total):
        return f"The parts add up to the recorded wall time: {parts:.3f} s of {total:.3f} s, with nothing left over."
    return (
        f"The parts add up to {parts:.3f} s but {total:.3f} s of wall time are recorded: {total - parts:+.3f} s apart."
    )


def _reward(buckets: Buckets) -> Chart:
    mean, std = buckets.mean("reward/mean"), buckets.mean("reward/std")
    pairs = list(zip(mean, std, strict=True))
    line = Line(
        label="mean ± std" if any(x is not None for x in std) else "mean",
        values=mean,
        color="blue",
        low=[m - s if m is not None and s is not None else None for m, s in pairs],
        high=[m + s if m is not None and s is not None else None for m, s in pairs],
    )
    return Chart(title="Reward", lines=_measured([line]), from_zero=False, size="wide")


def _accuracy(buckets: Buckets) -> Chart:
    lines = [
        Line(label=key.removeprefix("eval/"), values=buckets.mean(key), color=color, dash=dash, dots=True)
        for key, (color, dash) in zip(_accuracy_keys(buckets), LINE_STYLES, strict=False)
    ]
    return Chart(title="Held-out accuracy", lines=_measured(lines), kind="percent", from_zero=False, size="wide")


def _accuracy_keys(buckets: Buckets) -> list[str]:
    """Those that one chart shows together, as many as it can tell apart."""
    keys = dict.fromkeys(key for group in buckets.groups for row in group for key in row)
    return sorted(
        (k for k in keys if k.startswith(("eval/accuracy", "eval/pass@"))), key=lambda k: k != "eval/accuracy"
    )


def _length(buckets: Buckets) -> Chart:
    low, high = buckets.low("response_length/min"), buckets.high("response_length/max")
    has_band = any(value is not None for value in low)
    line = Line(
        label="mean, shortest–longest" if has_band else "mean",
        values=buckets.mean("response_length/mean"),
        color="blue",
        low=low,
        high=high,
    )
    return Chart(title="Response length, tokens", lines=_measured([line]), kind="count")


def _line(buckets: Buckets, key: str, label: str, color: str = "blue", dash: str = "", *, ranged: bool = True) -> Line:
    # A mean over many steps hides a spike; the band from least to greatest shows it.
    ranged = ranged and buckets.per_bucket > 1
    low, high = (buckets.low(key), buckets.high(key)) if ranged else (None, None)
    return Line(label=label, values=buckets.mean(key), color=color, dash=dash, low=low, high=high)


def _measured(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if any(value is not None for value in line.values)]


def ends(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """First and last value of a metric."""
    found = column(rows, key)
    return (found[0][1], found[-1][1]) if found else None


def chart_values(chart: Chart) -> list[Values]:
    """What the page's script reads off, to five digits."""
    return [[None if value is None else float(f"{value:.5g}") for value in line.values] for line in chart.lines]
