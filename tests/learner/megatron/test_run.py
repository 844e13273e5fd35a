"""A whole run of processes started by torchrun."""

import json
import os
import subprocess
import sys

from builders import save_tiny_model, small_run


def test_experts_dealt_over_data_ranks_with_unequally_many_micro_batches(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen3_moe")
    overrides = small_run(
        model,
        "learner=megatron",
        "learner.ep=2",
        "learner.max_tokens_per_microbatch=48",  # some three micro-batches a step, for two ranks
        "train.moe_aux_loss_coef=0.01",
        "train.prompts_per_step=3",
        "algorithm.importance_level=sequence",
        "run.console=plain",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastgrpo"]
    job = subprocess.run(
        [*command, "train", *overrides],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    assert "tp=1 x pp=1 x 2 data parallel, experts over ep=2" in job.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "moe/balance" in row]
    assert len(trained) == 2
    for row in trained:
        assert 1 <= row["moe/balance"] < 2.5
        assert row["updates/skipped"] == 0
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
