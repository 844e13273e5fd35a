"""Jobs of two of torchrun's agents, as on two nodes: here they share the machine, and each has a directory of its own.

That ranks of several nodes meet over a network between them is tried by hand: docs/parallelism.md says how.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from builders import save_tiny_model, small_run
from runs import without_clock

from fastgrpo.metrics import read_jsonl

LIMIT_S = 240


def agents(*directories: Path, processes: int, command: list[str]) -> list[subprocess.CompletedProcess]:
    """What the agents of a job, each in a directory, have come to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(directories)}", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc-per-node={processes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*launcher, *command], cwd=directory, **options) for directory in directories]
    try:
        said = [job.communicate(timeout=LIMIT_S) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [
        subprocess.CompletedProcess(job.args, job.returncode, *of_job) for job, of_job in zip(jobs, said, strict=True)
    ]


def train(model: str, *more: str) -> list[str]:
    cut = ("learner=megatron", "learner.tp=2", "train.num_steps=1", "eval.every=0", "run.console=plain")
    return ["-m", "fastgrpo", "train", *small_run(model, *cut, *more)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


def test_two_agents_of_one_process_train_like_one_of_two(tmp_path, model):
    """Rank 1 is then the first of its node."""
    for name, places, processes in (("one", [tmp_path], 2), ("two", [tmp_path] * 2, 1)):
        for job in agents(*places, processes=processes, command=train(model, f"run.dir={name}")):
            assert job.returncode == 0, job.stderr[-4000:]
    runs = [tmp_path / name for name in ("one", "two")]
    assert sorted(path.name for path in runs[0].iterdir()) == sorted(path.name for path in runs[1].iterdir())
    weights = [(run / "hf" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    rows = [without_clock(read_jsonl(run / "metrics.jsonl")) for run in runs]
    assert rows[0] == rows[1]
    assert rows[0][-1]["step"] == 1


def test_a_run_dir_that_the_nodes_do_not_share_is_refused_before_weights_are_read(tmp_path, model):
    places = [tmp_path / name for name in ("a", "b")]
    for place in places:
        place.mkdir()
    script = str(Path(__file__).with_name("impatient.py"))
    jobs = agents(*places, processes=1, command=[script, *train(model, "model.lora.path=nowhere")[2:]])
    host = socket.gethostname()
    for job in jobs:
        assert job.returncode != 0
        lines = [line for line in job.stderr.splitlines() if line.startswith("fastgrpo: ")]
        assert len(lines) == 1, job.stderr[-4000:]
        assert lines[0].startswith(f"fastgrpo: run.dir=run: rank 1 on {host} does not see what rank 0 writes there (")
