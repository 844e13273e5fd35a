"""vLLM's jobs, each in a process group of its own and started once, when first asked for."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from setting import MODELS, save_model

HERE = Path(__file__).parent
LIMIT_S = 500


def run_job(script: str, directory: Path, num_ranks: int) -> None:
    """Raise with the job's output where it fails. Whatever it does, it does not outlive this call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        }
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(directory / f"{script}-{rank}.log", "w") as log:
            command = [sys.executable, str(HERE / f"{script}_job.py"), str(directory)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < deadline, f"{script} hangs:\n{output(directory, script, 0)}"
            time.sleep(0.05)
        for rank, process in enumerate(processes):
            assert not process.returncode, f"rank {rank}:\n{output(directory, script, rank)}"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def output(directory: Path, script: str, rank: int) -> str:
    return (directory / f"{script}-{rank}.log").read_text()[-4000:]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A directory with one Hugging Face directory a model, the same for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "vllm"
    directory.mkdir(exist_ok=True)
    with open(directory / "models.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in MODELS:
            if not (directory / name).exists():
                save_model(directory, name)
    return directory


@pytest.fixture(scope="session")
def alone(models):
    """What alone_job.py found."""
    return results_of("alone", models)


@pytest.fixture(scope="session")
def experts(models):
    """What experts_job.py found."""
    return results_of("experts", models)


@pytest.fixture(scope="session")
def ranks(models):
    """What ranks_job.py found, on each of its ranks."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    return results_of("ranks", models, num_ranks=2)


@pytest.fixture
def start(models):
    """run_job on the models: start(script, num_ranks=2)."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    return partial(run_job, directory=models)


def results_of(script: str, directory: Path, num_ranks: int = 1) -> Any:
    """The job's results, of one run for all of pytest's workers."""
    results = directory / f"{script}.json"
    with open(directory / f"{script}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            run_job(script, directory, num_ranks)
    return json.loads(results.read_text())
