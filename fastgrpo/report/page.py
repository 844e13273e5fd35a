"""The page: what was run, how it went in numbers, the figures, the completions, the configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastgrpo.data_files import shown
from fastgrpo.report import samples
from fastgrpo.report.assets import CSS, SCRIPT
from fastgrpo.report.charts import Chart, render, smoothing_window, x_axis
from fastgrpo.report.figures import chart_values, ends, further_charts, ledger_chart, ledger_table, main_charts
from fastgrpo.report.series import Buckets, Row, column, duration, make_buckets, number, show

# Nothing in the file can reach the network, whatever a completion says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# A control character would vanish or, as NUL, be replaced; its picture is seen.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
Config = Mapping[str, Any]


def build(
    name: str, rows: Sequence[Row], kept: Mapping[str, samples.Ends], config: Config, config_text: str, written: str
) -> str:
    """The whole document, from merged rows in order of their steps."""
    figures, script = '<p class="lead">No step is recorded yet.</p>', ""
    if rows:
        buckets = make_buckets(rows)
        main, further, ledger = main_charts(buckets), further_charts(buckets), ledger_chart(buckets)
        figures = _curves(buckets, main, further) + _time(buckets, ledger, rows)
        data = _data(buckets, [*main, *further, *([ledger] if ledger else [])])
        script = f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script>'
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(name)} · fastgrpo</title><style>{CSS}</style></head><body>"
        f"{_header(name, rows, config, written)}"
        f"<main>{figures}{samples.render(kept)}{_configuration(config_text)}</main>"
        f"<footer>Made by fastgrpo from metrics.jsonl, samples.jsonl and config.yaml beside this file.</footer>"
        f"{script}</body></html>\n"
    )
    return page.translate(VISIBLE)


def _header(name: str, rows: Sequence[Row], config: Config, written: str) -> str:
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd><dd class=sub>{escape(sub)}</dd></div>"
        for label, value, sub in _tiles(rows, config)
    )
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(config))
    return (
        f'<header><p class="kicker">GRPO run{escape(written)}</p><h1>{escape(name)}</h1>'
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
        + "".join(f'<p class="notice">{escape(text)}</p>' for text in _notices(rows))
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + "</header>"
    )


def _tiles(rows: Sequence[Row], config: Config) -> list[tuple[str, str, str]]:
    """The headline: (label, value as HTML, explanation) each."""
    tiles = []
    if both := ends(rows, "eval/accuracy"):
        best_step, best = max(column(rows, "eval/accuracy"), key=lambda pair: pair[1])
        tiles.append(("Held-out accuracy", _from_to(*both, "percent"), f"best {100 * best:.1f} % at step {best_step}"))
    if both := ends(rows, "reward/mean"):
        tiles.append(("Mean reward", _from_to(*both, "real"), "first and last step"))
    if rows:
        step, planned = rows[-1]["step"], _get(config, "train.num_steps")
        done = planned is None or step >= planned
        tiles.append(("Steps", str(step), "" if planned is None else "complete" if done else f"of {planned} planned"))
    times = column(rows, "time/total_s")
    if times:
        seconds = sum(value for _, value in times)
        steps = [value for step, value in times if step > 0]
        typical = f"median {show(sorted(steps)[len(steps) // 2], 'seconds')} a step" if steps else ""
        tiles.append(("Wall time", duration(seconds), typical))
    if tokens := [value for _, value in column(rows, "tokens")]:
        rates = sorted(value for _, value in column(rows, "tokens_per_second"))
        rate = f"median {show(rates[len(rates) // 2], 'count')} tokens/s" if rates else ""
        tiles.append(("Tokens", show(sum(tokens), "count"), rate))
    return tiles


def _from_to(first: float, last: float, kind: str) -> str:
    if first == last:
        return show(last, kind)
    return f'<span class="from">{show(first, kind)} →</span> {show(last, kind)}'


def _notices(rows: Sequence[Row]) -> list[str]:
    """What a reader must not overlook: metrics that were not finite."""
    bad: dict[str, list[int]] = {}
    for row in rows:
        for key, value in row.items():
            if value is None or (isinstance(value, float) and number(value) is None):
                bad.setdefault(key, []).append(row["step"])
    return [
        f"{key} was not finite at {len(steps)} step{'s' * (len(steps) > 1)}: "
        f"{', '.join(map(str, steps[:8]))}{', …' if len(steps) > 8 else ''}"
        for key, steps in bad.items()
    ]


def _facts(config: Config) -> list[tuple[str, str]]:
    """The configuration's few values that tell one run from another."""

    def text(key: str, form: str = "{}") -> str:
        value = _get(config, key)
        return "" if value is None else form.format(shown(value))

    built = "built from nothing" if "model" in config else ""
    clips = _get(config, "algorithm.surrogate") in ("clip", "cispo")
    clip = text("algorithm.clip_ratio_low", " −{}") + text("algorithm.clip_ratio_high", " +{}") if clips else ""
    facts = {
        "model": text("model.path") or built,
        "data": " ".join(filter(None, [text("data.source"), text("data.path") or text("data.operation")])),
        "reward": text("reward.path"),
        "environment": text("environment.path"),
        "objective": text("algorithm.surrogate") + clip + text("algorithm.ratio_level", ", {} ratio"),
        "advantage": text("algorithm.advantage") + text("algorithm.aggregation", ", {}"),
        "KL": "none" if _get(config, "algorithm.kl_coef") == 0 else text("algorithm.kl_coef") + _estimator(text),
        "reference": text("algorithm.reference.path"),
        "a step": text("train.prompts_per_step", "{} prompts") + text("algorithm.group_size", " × {}"),
        "learning rate": text("train.learning_rate") + text("train.lr_schedule", ", {}"),
        "sampling": text("sampling.temperature", "temperature {}") + text("sampling.max_new_tokens", ", ≤ {} tokens"),
        "learner, sampler": ", ".join(filter(None, [text("learner.kind"), text("sampler.kind")])),
        "device": ", ".join(filter(None, [text("cluster.device"), text("cluster.dtype")])),
        "seed": text("seed"),
    }
    return [(label, value.strip(" ,")) for label, value in facts.items() if value.strip(" ,")]


def _estimator(text: Any) -> str:
    return text("algorithm.kl_estimator", ", {}") + text("algorithm.reference.schedule", ", {} reference")


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _curves(buckets: Buckets, charts: Sequence[Chart], further: Sequence[Chart]) -> str:
    window = smoothing_window(len(buckets.groups))
    notes = ["Point at a chart to read every chart at that step."]
    if window > 1:
        near = window * buckets.per_bucket
        notes.append(f"Thin lines are the values, thick ones the mean of the {near} steps around without extremes.")
    if buckets.per_bucket > 1:
        notes.append(
            f"A value is the mean of {buckets.per_bucket} steps; the band reaches from the least to the greatest."
        )
    more = (
        f'<details><summary>{len(further)} more metrics</summary><div class="charts">'
        f"{''.join(render(chart, buckets) for chart in further)}</div></details>"
        if further
        else ""
    )
    figures = "".join(render(chart, buckets) for chart in charts)
    return (
        f'<section id="curves"><h2>Curves</h2><p class="lead">{" ".join(notes)}</p>'
        f'<div class="charts">{figures}</div>{more}</section>'
    )


def _time(buckets: Buckets, ledger: Chart | None, rows: Sequence[Row]) -> str:
    if ledger is None:
        return ""
    return (
        f'<section id="time"><h2>Where the time went</h2><div class="charts">{render(ledger, buckets)}</div>'
        f"{ledger_table(rows)}</section>"
    )


def _configuration(text: str) -> str:
    if not text:
        return ""
    return (
        '<section id="configuration"><h2>Configuration</h2><details><summary>Everything, as resolved</summary>'
        f"<pre>\n{escape(text)}</pre></details></section>"
    )


def _data(buckets: Buckets, charts: Sequence[Chart]) -> str:
    axis = x_axis(buckets)
    data = {
        "low": axis.low,
        "high": axis.high,
        "first": buckets.first,
        "last": buckets.last,
        "charts": [{"kind": chart.kind, "values": chart_values(chart)} for chart in charts],
    }
    # Only numbers go in, but a script element must never be able to end early.
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
