"""A rank that dies ends the job soon, and is named as the cause."""

import os
import subprocess
import sys
from pathlib import Path

import scenario

LIMIT_S = 120  # most of it is imports on busy cores; the others notice the death at once


def test_a_rank_killed_in_the_middle_of_an_update_takes_the_job_down(tmp_path):
    scenario.save_models(tmp_path, {"qwen3"})
    script = Path(__file__).with_name("dies.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    job = subprocess.run(
        [*command, str(tmp_path / "qwen3")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert job.returncode != 0
    assert "rank 1 is killed now" in job.stdout
    assert "came to its end" not in job.stdout
    cause = job.stderr[job.stderr.index("Root Cause") :]
    assert "exitcode  : -9" in cause
