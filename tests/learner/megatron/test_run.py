"""A whole run of processes started by torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import save_tiny_model, small_run
from safetensors.torch import load_file

from fastgrpo import commands
from fastgrpo.main import compose, with_shorthands
from fastgrpo.metrics import read_jsonl

ENVIRONMENTS = Path(__file__).parents[2] / "example_environments.py"


def torchrun(directory: Path, *command: str, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, *command],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def settings(directory: Path) -> list[str]:
    return small_run(
        str(directory / "model"),
        "learner=megatron",
        "learner.ep=2",
        "learner.max_tokens_per_microbatch=48",  # some three micro-batches a step, for two ranks
        "learner.router_replay=true",
        "train.moe_aux_loss_coef=0.01",
        "train.prompts_per_step=3",
        "algorithm.importance_level=sequence",
        "checkpoint.every=1",
        "checkpoint.background=true",
        "checkpoint.export_every=2",
        f"environment.path={ENVIRONMENTS}:echoes",
        "environment.num_workers=0",
        f"sampling.stop_token_ids=[{','.join(map(str, range(2, 70)))}]",
        "sampling.max_new_tokens=24",
        "run.console=plain",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the process of a run of two steps, with both their checkpoints."""
    directory = tmp_path_factory.mktemp("finished")
    save_tiny_model(directory / "model", "qwen3_moe")
    job = torchrun(directory, "-m", "fastgrpo", "train", *settings(directory))
    assert job.returncode == 0, job.stderr[-4000:]
    return directory, job


def test_experts_dealt_over_data_ranks_with_unequally_many_micro_batches(finished):
    directory, job = finished
    assert "tp=1 x pp=1 x 2 data parallel, experts over ep=2" in job.stdout
    trained = [row for row in read_jsonl(directory / "run" / "metrics.jsonl") if "moe/balance" in row]
    assert len(trained) == 2
    for row in trained:
        assert 1 <= row["moe/balance"] < 2.5
        assert row["moe/replayed_difference"] < 0.02  # the sampler has the learner's weights, and rounds otherwise
        assert row["updates/skipped"] == 0
        assert row["sampler_mismatch/max_abs"] < 2e-4  # in every turn, on either rank
        assert row["turns/mean"] > 1
    policies = [directory / "run" / name / "model.safetensors" for name in ("hf", "exports/step-000002")]
    assert policies[0].read_bytes() == policies[1].read_bytes()


def test_one_rank_finds_a_flipped_byte_and_one_with_a_full_disk_ends_the_job_in_one_line(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory / "run", tmp_path / "run")
    spoilt = tmp_path / "run/checkpoints/step-000002/learner/__1_0.distcp"
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1
    spoilt.write_bytes(content)
    script = str(Path(__file__).with_name("full_disk.py"))
    job = torchrun(tmp_path, script, "train", *settings(directory), "train.num_steps=4", "resume=auto")
    assert job.returncode != 0
    said = "checkpoint run/checkpoints/step-000002 is broken (learner/__1_0.distcp is not what was written); skipped"
    assert said in job.stdout
    assert "resuming after step 1 from run/checkpoints/step-000001\n" in job.stdout
    lines = [line for line in job.stderr.splitlines() if line.startswith("fastgrpo: ")]
    assert len(lines) == 1, job.stderr[-4000:]
    assert lines[0].startswith("fastgrpo: checkpoint of step 2 cannot be written to run/checkpoints: rank 1: ")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_fresh_adapters_train_as_in_a_run_of_the_torch_learner(workplace):
    """From the same seed, merged for the sampler after every update, with the base as the reference."""
    model = save_tiny_model(workplace / "model", "qwen3")
    options = ["model.lora.rank=4", "train.learning_rate=0.02", "algorithm.kl_coef=0.05", "run.console=none"]
    config, text = compose("train", with_shorthands(small_run(model, *options, "run.dir=torch")))
    assert commands.train(config, text)[0] is None
    cut = small_run(model, *options, "learner=megatron", "learner.tp=2", "checkpoint.export_every=1")
    job = torchrun(workplace, "-m", "fastgrpo", "train", *cut)
    assert job.returncode == 0, job.stderr[-4000:]
    rows, expected = (read_jsonl(workplace / name / "metrics.jsonl") for name in ("run", "torch"))
    for got, wanted in zip(rows, expected, strict=True):
        for name in {"reward/mean", "loss", "grad_norm", "kl", "eval/accuracy"} & wanted.keys():
            assert got[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    mine, theirs = (load_file(workplace / name / "hf" / "adapter_model.safetensors") for name in ("run", "torch"))
    assert mine.keys() == theirs.keys()
    first, last = (load_file(workplace / f"run/exports/step-00000{step}/adapter_model.safetensors") for step in (1, 2))
    assert all(torch.equal(tensor, mine[name]) for name, tensor in last.items())
    assert any(not torch.equal(tensor, mine[name]) for name, tensor in first.items())
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=0)


def test_one_process_alone_trains_too(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3_moe")
    more = ("learner.ep=1", "train.num_steps=1", "checkpoint.every=0")
    job = torchrun(tmp_path, "-m", "fastgrpo", "train", *settings(tmp_path), *more, processes=1)
    assert job.returncode == 0, job.stderr[-4000:]
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1
