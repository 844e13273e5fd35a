from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
sys.path.insert(0, str(Path(__file__).parent))
import scenario
from launch import run_job
from oracle import torch_result


@pytest.fixture(scope="session")
def results_of(tmp_path_factory):
    """The results of the job with so many processes, which is started once, when first asked for."""
    directory = tmp_path_factory.mktemp("megatron")
    scenario.save_models(directory, {case.model for case in scenario.CASES} | {scenario.RESHARDED_MODEL})
    finished: dict[int, dict[str, Any] | AssertionError] = {}

    def results(num_processes: int) -> dict[str, Any]:
        if num_processes not in finished:
            try:
                finished[num_processes] = run_job(num_processes, directory)
            except AssertionError as error:
                finished[num_processes] = error
        found = finished[num_processes]
        if isinstance(found, AssertionError):  # once is enough to see a job fail
            raise found
        return found

    return results


@pytest.fixture(scope="session")
def jobs(results_of):
    """What came out of a case."""
    return lambda case: results_of(case.processes)[case.name]


@pytest.fixture(scope="session")
def oracle():
    """What the torch learner computes for a model: the same keys as a case's result."""
    computed: dict[str, dict[str, Any]] = {}

    def expected(model: str) -> dict[str, Any]:
        if model not in computed:
            computed[model] = torch_result(model)
        return computed[model]

    return expected
