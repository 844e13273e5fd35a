"""Start a distributed job and read what came out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMIT_S = 900


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
            _check(processes, logs)
            assert time.monotonic() < deadline, f"the job hangs; rank 0 says:\n{logs[0].read_text()[-4000:]}"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    _check(processes, logs)
    results = read_results(num_processes, directory)
    assert results is not None
    return results


def _check(processes: list[subprocess.Popen], logs: list[Path]) -> None:
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        assert not process.poll(), f"rank {rank} ended with {process.returncode}:\n{log.read_text()[-4000:]}"


def read_results(num_processes: int, directory: Path) -> dict[str, Any] | None:
    """What a job that has come to its end has written."""
    file = directory / f"results-{num_processes}.pt"
    return torch.load(file) if file.exists() else None
