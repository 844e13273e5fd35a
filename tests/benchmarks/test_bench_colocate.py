"""The benchmark of learner and vLLM in one process: it runs, and says all that is asked of it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_colocate.py"


def test_it_measures_a_step_with_everything_shared(tmp_path):
    out = tmp_path / "colocate.csv"
    sizes = ["--prompts", "2", "--group-size", "2", "--prompt-tokens", "40", "--new-tokens", "4", "--steps", "2"]
    subprocess.run(
        [sys.executable, SCRIPT, *sizes, "--out", out],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        check=True,
        start_new_session=True,
        timeout=300,
    )
    with open(out, encoding="utf-8") as file:
        rows = {(row["mode"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}
    parts = ("generate", "update", "share", "prove", "sleep", "wake", "copy", "step")
    assert all(rows[part, "time"] > 0 for part in parts)
    assert rows["weights", "shared"] == rows["weights", "size"] > 0
    assert rows["step", "peak_memory"] > rows["weights", "size"] + rows["engine", "kv_cache"] > 0
    assert rows["step", "difference"] < 2e-5
