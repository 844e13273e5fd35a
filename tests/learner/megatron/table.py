"""The table of docs/parallelism.md: python tests/learner/megatron/table.py"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from launch import run_job
from oracle import error, largest_error, torch_result
from scenario import CASES, DENSE, EXPERTS, Case, save_models

COLUMNS = ("processes", "model", "layout", "logprobs", "gradients", "loss", "gradient norm", "weights after 3 steps")


def row(case: Case, actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    steps = list(zip(actual["steps"], expected["steps"], strict=True))
    errors = [
        error(actual["logprobs"], expected["logprobs"]),
        largest_error(actual["gradients"], expected["gradients"])[0],
        max(abs(a["loss"] / e["loss"] - 1) for a, e in steps),
        max(abs(a["grad_norm"] / e["grad_norm"] - 1) for a, e in steps),
        largest_error(actual["weights"], expected["weights"])[0],
    ]
    model, layout = case.name.split(maxsplit=1)
    return [str(case.processes), model, layout, *(f"{value:.1e}" for value in errors)]


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    oracle = functools.cache(torch_result)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_models(directory, {case.model for case in CASES} | {*DENSE, *EXPERTS})
        for processes in sorted({case.processes for case in CASES}):
            results = run_job(processes, directory)
            for case in CASES:
                if case.processes == processes:
                    print("| " + " | ".join(row(case, results[case.name], oracle(case.model))) + " |", flush=True)


if __name__ == "__main__":
    main()
