from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
sys.path.insert(0, str(Path(__file__).parent))
import scenario
from launch import read_results, run_job
from oracle import torch_result


@pytest.fixture(scope="session")
def results_of(tmp_path_factory):
    """The results of the job with so many processes, which is started once, when first asked for, by whichever of
    xdist's workers asks first."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "megatron"
    directory.mkdir(exist_ok=True)
    finished: dict[int, dict[str, Any] | AssertionError] = {}

    def results(num_processes: int) -> dict[str, Any]:
        if num_processes not in finished:
            with locked(directory):
                finished[num_processes] = _results(num_processes, directory)
        found = finished[num_processes]
        if isinstance(found, AssertionError):  # once is enough to see a job fail
            raise found
        return found

    return results


def _results(num_processes: int, directory: Path) -> dict[str, Any] | AssertionError:
    saved, failure = directory / "models-are-there", directory / f"failure-{num_processes}.txt"
    if not saved.exists():
        models = {case.model for case in scenario.CASES} | {*scenario.DENSE, *scenario.EXPERTS}
        scenario.save_models(directory, models)
        saved.touch()
    if failure.exists():
        return AssertionError(failure.read_text())
    try:
        return read_results(num_processes, directory) or run_job(num_processes, directory)
    except AssertionError as error:
        failure.write_text(str(error))
        return error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time."""
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
