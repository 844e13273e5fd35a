"""The learner benchmark: it runs, and times providers only where they compute the same gradient."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
from learner_peers import agree  # noqa: E402


def test_it_times_every_provider_on_one_update(tmp_path):
    providers = ["fastgrpo-megatron", "fastgrpo-torch", "hugging-face"]
    providers += ["trl"] if importlib.util.find_spec("trl") else []
    shape = ["--groups", "2", "--group-size", "2", "--prompt-tokens", "5", "--completion-tokens", "9", "--rounds", "1"]
    out = tmp_path / "learner.csv"
    subprocess.run(
        [sys.executable, BENCHMARKS / "bench_learner.py", *shape, "--out", out, "--providers", *providers],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        check=True,
    )
    with open(out, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted({row["provider"] for row in rows}) == sorted(providers)
    assert {row["metric"] for row in rows} == {"rate", "time"}


def test_other_gradients_are_not_timed():
    agree({"a": 1.0, "b": 1.0009}, 1e-3)
    for other in (1.1, float("nan"), 0.0):
        with pytest.raises(RuntimeError, match="differ"):
            agree({"a": 1.0, "b": other}, 1e-3)
