"""`fastgrpo train sampler=vllm`, as users run it."""

import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import save_tiny_model, small_run
from processes import fastgrpo, signal_at
from runs import without_clock

from fastgrpo.metrics import read_jsonl

ENVIRONMENTS = Path(__file__).parents[2] / "example_environments.py"


def forget_vllm() -> None:
    """As where it is not installed."""
    sys.modules["vllm"] = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", hidden_size=128, head_dim=32)


def settings(model: str, *more: str) -> list[str]:
    return [
        "train",
        *small_run(model, reward="varied_if_odd"),
        "sampler=vllm",
        "train.num_steps=4",
        "checkpoint.every=2",
        *more,
    ]


def rows_of(run):
    return without_clock(read_jsonl(run / "metrics.jsonl"))


def test_a_killed_run_with_vllm_resumes_bit_for_bit(workplace, model):
    ended = fastgrpo(*settings(model))
    assert (ended.code, ended.err) == (0, "")
    shutil.move("run", "undisturbed")
    kill = partial(signal_at, "fastgrpo.trainer:update_policy", 3, signal.SIGKILL)
    exporting = settings(model, "checkpoint.export_every=1")  # which the sampler, on the same tensors, does not feel
    assert fastgrpo(*exporting, install=kill).code == -signal.SIGKILL
    assert fastgrpo(*exporting, "resume=auto").code == 0
    run, undisturbed = workplace / "run", workplace / "undisturbed"
    assert (run / "hf/model.safetensors").read_bytes() == (undisturbed / "hf/model.safetensors").read_bytes()
    assert rows_of(run) == rows_of(undisturbed)
    assert (run / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    exports = {path.parent.name: path.read_bytes() for path in run.glob("exports/*/model.safetensors")}
    assert sorted(exports) == [f"step-00000{step}" for step in (1, 2, 3, 4)]
    assert exports["step-000004"] == (run / "hf/model.safetensors").read_bytes() != exports["step-000003"]
    saved = [torch.load(d / "checkpoints/step-000004/learner/learner.pt") for d in (run, undisturbed)]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    assert all(torch.equal(tensor, saved[1]["model"][name]) for name, tensor in saved[0]["model"].items())


def test_a_run_with_an_environment(workplace, model):
    """Turns of both sides in one completion, whose logprobs the learner agrees on."""
    echoes = f"environment.path={ENVIRONMENTS}:echoes"
    stops = f"sampling.stop_token_ids=[{','.join(map(str, range(2, 70)))}]"
    ended = fastgrpo(*settings(model, echoes, "environment.num_workers=0", stops, "sampling.max_new_tokens=24"))
    assert (ended.code, ended.err) == (0, "")
    rows = rows_of(workplace / "run")
    assert max(row["turns/max"] for row in rows[1:]) > 2
    assert max(row["sampler_mismatch/max_abs"] for row in rows[1:]) < 2e-5


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["sampler.tp=3"],
            "sampler.tp=3: cannot cut the model's 4 attention and 2 key/value heads; possible with 1 process: 1",
        ),
        (["sampler=torch", "sampler.tp=2"], "sampler.tp=2: sampler=torch is one model on one device; use sampler=vllm"),
        (
            ["sampler.gpu_memory_utilization=1.5"],
            "sampler.gpu_memory_utilization=1.5: use a share above 0 and at most 1, or null",
        ),
        (
            ["cluster.device=cuda:1"],
            "cluster.device=cuda:1: vLLM takes the first GPU it sees; use cuda, and set CUDA_VISIBLE_DEVICES",
        ),
        (
            ["sampler.merge_adapters=true"],
            "sampler.merge_adapters=true: it is for sampler=vllm with adapters (model.lora.rank); use false",
        ),
        (["sampler.proof=some"], "sampler.proof=some: choose one of sampled, full"),
        (["sampler.bucket_mb=0"], "sampler.bucket_mb=0: use a value of at least 1"),
    ],
)
def test_impossible_settings_end_in_one_line(workplace, model, more, line):
    ended = fastgrpo(*settings(model, *more))
    assert (ended.code, ended.err) == (2, f"fastgrpo: {line}\n")


def test_without_vllm_a_line_says_how_to_install_it(workplace, model):
    ended = fastgrpo(*settings(model), install=forget_vllm)
    line = "sampler=vllm: vllm is not installed; pip install fastgrpo[vllm], or `make vllm` for a CPU"
    assert (ended.code, ended.err) == (2, f"fastgrpo: {line}\n")
    assert not (workplace / "run" / "metrics.jsonl").exists()


def test_a_model_that_vllm_cannot_run_ends_in_one_line(workplace, tiny_qwen2):
    ended = fastgrpo(*settings(tiny_qwen2))  # heads of 8, which its attention on a CPU does not have
    assert ended.code == 2
    assert ended.err.startswith("fastgrpo: sampler=vllm: it cannot run this model: ")
    assert ended.err.count("\n") == 1


def test_eval_measures_with_vllm_what_it_measures_with_torch(workplace, model):
    asked = [option for option in small_run(model) if "run.dir" not in option]
    shown = [fastgrpo("eval", *asked, f"sampler={sampler}") for sampler in ("torch", "vllm")]
    assert [(ended.code, ended.err) for ended in shown] == [(0, "")] * 2
    assert shown[0].out == shown[1].out
    assert "eval/response_length" in shown[0].out
