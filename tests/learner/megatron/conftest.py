from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import scenario  # noqa: E402

LIMIT_S = 500


def run_job(num_processes: int, directory: Path) -> dict[str, Any]:
    """Start the job's processes and wait for them; the first to fail takes the others down and is shown."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "job.py")]
    logs = [directory / f"log-{num_processes}-{rank}.txt" for rank in range(num_processes)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as file:
            arguments = [str(rank), str(num_processes), str(directory)]
            processes.append(subprocess.Popen([*command, *arguments], stdout=file, stderr=file, env=environment))
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            assert not failed, f"rank {failed[0]}:\n{logs[failed[0]].read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"the job hangs; rank 0 says:\n{logs[0].read_text()[-4000:]}"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    assert not failed, f"rank {failed[0]}:\n{logs[failed[0]].read_text()[-4000:]}"
    return torch.load(directory / f"results-{num_processes}.pt")


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    """The results of every case, by its name; each number of processes is started once, when first asked for."""
    directory = tmp_path_factory.mktemp("megatron")
    scenario.save_models(directory, {case.model for case in scenario.CASES})
    finished: dict[int, dict[str, Any] | AssertionError] = {}

    def result_of(case: scenario.Case) -> dict[str, Any]:
        if case.processes not in finished:
            try:
                finished[case.processes] = run_job(case.processes, directory)
            except AssertionError as error:
                finished[case.processes] = error
        results = finished[case.processes]
        if isinstance(results, AssertionError):  # once a job is enough to see it fail
            raise results
        return results[case.name]

    return result_of


@pytest.fixture(scope="session")
def oracle():
    """What the torch learner computes for a model: the same keys as a case's result."""
    computed: dict[str, dict[str, Any]] = {}

    def expected(model: str) -> dict[str, Any]:
        if model not in computed:
            computed[model] = _torch_result(model)
        return computed[model]

    return expected


def _torch_result(name: str) -> dict[str, Any]:
    from job import by_token

    from fastgrpo.learner.torch_learner import TorchLearner

    model, reference = scenario.model_of(name), scenario.model_of(name)
    learner = TorchLearner(model, scenario.TRAIN, num_updates=scenario.NUM_STEPS + 1, reference=reference)
    batches = scenario.with_logprobs(scenario.batches_of(True), learner)
    result: dict[str, Any] = {
        "names": [name for name, _ in learner.named_weights()],
        "logprobs": by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches]),
    }
    gradients: dict[str, torch.Tensor] = {}
    handles = [  # update() clears the gradients, so they are caught before it clips them
        param.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
        for name, param in model.named_parameters()
    ]
    result["steps"] = [vars(learner.update(batches, scenario.OBJECTIVE))]
    for handle in handles:
        handle.remove()
    result["gradients"] = gradients
    learner.move_reference(0.5)
    result["steps"] += [vars(learner.update(batches, scenario.OBJECTIVE)) for _ in range(scenario.NUM_STEPS - 1)]
    result["weights"] = {name: tensor.detach().clone() for name, tensor in learner.named_weights()}
    after = [learner.logprobs(batch, temperature=1.0, reference=True) for batch in batches]
    result["reference"] = by_token(batches, after)
    return result
