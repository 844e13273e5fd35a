"""Whole runs in a test's own process, and what of their metrics repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastgrpo.assemble import assemble
from fastgrpo.main import compose, with_shorthands
from fastgrpo.metrics import read_jsonl
from fastgrpo.ranks import join_job
from fastgrpo.run import Run
from fastgrpo.signals import StopRequest
from fastgrpo.trainer import train

OF_THE_MACHINE = ("time/", "memory/", "tokens_per_second", "tflop_per_second", "mfu")


@contextmanager
def assembled(*overrides: str) -> Iterator[Run]:
    config, _ = compose("train", with_shorthands([*overrides, "run.console=none"]))
    with assemble(config, join_job()) as run:
        yield run


def rows_of(*overrides: str) -> list[dict]:
    """Train as configured; the rows of metrics.jsonl."""
    with assembled(*overrides) as run:
        train(run, StopRequest(print))
    return read_jsonl(run.run_dir / "metrics.jsonl")


def without_clock(rows: list[dict]) -> list[dict]:
    """The rows less what the machine's pace and memory decide."""
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)} for row in rows]
