"""The report's completions: the same held-out prompts at the first and the last evaluation, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastgrpo.report.series import number, show

Record = Mapping[str, Any]
NUM_PAIRS = 8
MAX_CHARACTERS = 4000
"""Longer texts are cut, visibly: a report must open on a phone."""


@dataclass(kw_only=True)
class Ends:
    """The records of the first and of the last step that has any."""

    first: list[Record] = field(default_factory=list)
    last: list[Record] = field(default_factory=list)


def first_and_last(records: Iterable[Record]) -> dict[str, Ends]:
    """What is shown of samples.jsonl, by kind, in one pass that holds two steps in memory."""
    ends: dict[str, Ends] = {}
    for record in records:
        step, kind = number(record.get("step")), record.get("kind")
        if step is None or not isinstance(kind, str):
            continue
        end = ends.setdefault(kind, Ends())
        if not end.first or step < end.first[0]["step"]:
            end.first = [record]
        elif step == end.first[0]["step"]:
            end.first.append(record)
        if not end.last or step > end.last[0]["step"]:
            end.last = [record]
        elif step == end.last[0]["step"]:
            end.last.append(record)
    return ends


def render(ends: Mapping[str, Ends]) -> str:
    """The section, or nothing where no completion was kept."""
    parts = []
    if evaluated := ends.get("eval"):
        parts.append(_same_prompts(evaluated))
    if trained := ends.get("train"):
        body = _own_prompts(trained)
        parts.append(f"<details><summary>Training completions</summary>{body}</details>" if parts else body)
    return f'<section id="completions"><h2>Completions</h2>{"".join(parts)}</section>' if parts else ""


def _same_prompts(ends: Ends) -> str:
    first = {record.get("prompt_id"): record for record in reversed(ends.first)}
    last = {record.get("prompt_id"): record for record in reversed(ends.last)}
    shared = [key for key in dict.fromkeys(r.get("prompt_id") for r in ends.first) if key in last]
    if not shared or ends.first[0]["step"] == ends.last[0]["step"]:
        lead = f"Held-out prompts at step {ends.last[0]['step']}."
        pairs = [(record, [record]) for record in list(last.values())[::-1][:NUM_PAIRS]]
    else:
        lead = (
            f"The first {min(NUM_PAIRS, len(shared))} of {len(shared)} kept held-out prompts, answered at step "
            f"{ends.first[0]['step']} and at step {ends.last[0]['step']}."
        )
        pairs = [(last[key], [first[key], last[key]]) for key in shared[:NUM_PAIRS]]
    return f'<p class="lead">{lead}</p>' + "".join(
        f'<article class="sample">{_question(record)}<div class="pair">{"".join(map(_said, said))}</div></article>'
        for record, said in pairs
    )


def _own_prompts(ends: Ends) -> str:
    steps = [ends.first] if ends.first[0]["step"] == ends.last[0]["step"] else [ends.first, ends.last]
    lead = " and ".join(f"of step {records[0]['step']}" for records in steps)
    columns = "".join(
        "<div>"
        + "".join(f'<article class="sample">{_question(r)}{_said(r)}</article>' for r in records[:NUM_PAIRS])
        + "</div>"
        for records in steps
    )
    return f'<p class="lead">Completions {lead}.</p><div class="pair">{columns}</div>'


def _question(record: Record) -> str:
    answer = record.get("answer")
    expected = f"<span>answer <b>{_text(answer)}</b></span>" if answer is not None else ""
    return (
        f"<header><span>{_text(record.get('prompt_id', ''))}</span>{expected}</header>"
        f'<pre class="prompt" dir="auto">\n{_text(record.get("prompt", ""))}</pre>'
    )


def _said(record: Record) -> str:
    reward, advantage = number(record.get("reward")), number(record.get("advantage"))
    facts = [f"<span>step {_text(record['step'])}</span>", _verdict(record, reward)]
    facts.append(f"<span>reward {show(reward, 'count' if reward in (0.0, 1.0) else 'real')}</span>")
    if advantage is not None:
        facts.append(f"<span>advantage {advantage:+.2f}</span>")
    if record.get("finish_reason") == "length":
        facts.append("<span>cut at the length limit</span>")
    completion = _text(record.get("completion", "")) or "<i>(empty)</i>"
    return f'<div class="said"><div class="meta">{"".join(facts)}</div><pre dir="auto">\n{completion}</pre></div>'


def _verdict(record: Record, reward: float | None) -> str:
    correct = record.get("correct")
    if correct is None and reward is not None:
        correct = True if reward >= 1 else False if reward <= 0 else None
    if correct is None:
        return ""
    return '<b class="right">✓ correct</b>' if correct else '<b class="wrong">✗ incorrect</b>'


def _text(value: object) -> str:
    text = str(value)
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}\n[… {len(text) - MAX_CHARACTERS} more characters]"
    return escape(text)
