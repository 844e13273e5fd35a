"""A whole run is the one-process run, however it is cut over processes, and goes on where it was killed."""

import functools
from pathlib import Path

import pytest
from builders import save_tiny_model, small_run
from runs import without_clock
from safetensors.torch import load_file
from test_run import torchrun
from transformers import AutoModelForCausalLM

from fastgrpo import commands
from fastgrpo.main import compose, with_shorthands
from fastgrpo.metrics import read_jsonl

FAILS = str(Path(__file__).with_name("fails.py"))
PROFILED = ["run.profile_steps=[2]", "run.profile_ranks=[3]"]
CUTS = {
    "dp=2": (2, [], "2 = tp=1 x pp=1 x 2 data parallel; 8 sequences each"),
    "cp=2": (2, ["learner.cp=2"], "2 = tp=1 x pp=1 x cp=2 x 1 data parallel; 16 sequences each"),
    "tp=2 pp=2": (
        4,
        ["learner.tp=2", "learner.pp=2", *PROFILED],
        "4 = tp=2 x pp=2 x 1 data parallel; 16 sequences each",
    ),
}


def settings(model: str, *more: str) -> list[str]:
    """Two steps of two updates each on ragged completions, of several micro-batches, with a reference, token means
    and the most undecided tokens: every weight of a token, and whether it learns, depends on all ranks' tokens."""
    return small_run(
        model,
        "learner.max_tokens_per_microbatch=64",
        "algorithm.aggregation=token_mean",
        "algorithm.kl_coef=0.05",
        "algorithm.top_entropy_quantile=0.6",
        "train.num_minibatches=2",
        "train.adam_eps=1e-4",  # or a gradient that is rounding alone would be a whole step
        "train.weight_decay=0.1",
        "checkpoint.every=1",
        f"sampling.stop_token_ids=[{','.join(map(str, range(2, 70)))}]",
        "sampling.max_new_tokens=12",
        "run.console=plain",
        *more,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The directory of the torch learner's run."""
    run = tmp_path_factory.mktemp("alone") / "run"
    config, text = compose("train", with_shorthands(settings(model, f"run.dir={run}")))
    assert commands.train(config, text)[0] is None
    return run


@pytest.fixture(scope="module")
def cut(model, tmp_path_factory):
    """The directory of a cut's run, and what it has printed."""

    @functools.cache
    def finished(name):
        processes, layout, _ = CUTS[name]
        directory = tmp_path_factory.mktemp("cut")
        command = ["-m", "fastgrpo", "train", *settings(model, "learner=megatron", *layout)]
        job = torchrun(directory, *command, processes=processes)
        assert job.returncode == 0, job.stderr[-4000:]
        return directory / "run", job.stdout

    return finished


each_cut = pytest.mark.parametrize("name", CUTS)


def rows_of(run: Path) -> list[dict]:
    return without_clock(read_jsonl(run / "metrics.jsonl"))


@each_cut
def test_it_takes_the_torch_learners_steps(name, cut, alone):
    run, printed = cut(name)
    assert CUTS[name][2] in printed
    rows, expected = rows_of(run), rows_of(alone)
    assert len(rows) == len(expected) == 3
    assert expected[1]["response_length/min"] < expected[1]["response_length/max"]
    for got, wanted in zip(rows, expected, strict=True):
        assert got.keys() == wanted.keys()
        # Smaller micro-batches, of which every rank gets some, hold a prompt more often.
        assert got.pop("tflop", 0) >= wanted.get("tflop", 0)
        assert got == pytest.approx({k: v for k, v in wanted.items() if k != "tflop"}, rel=1e-3, abs=2e-5)
        if "loss" in wanted:
            assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


@each_cut
def test_it_exports_the_torch_learners_policy(name, cut, alone, model):
    run, _ = cut(name)
    mine, theirs, before = (load_file(Path(path) / "model.safetensors") for path in (run / "hf", alone / "hf", model))
    assert mine.keys() == theirs.keys() == before.keys()
    for key, tensor in theirs.items():
        movement = (tensor - before[key]).abs().max()
        assert movement > 0, key
        assert (mine[key] - tensor).abs().max() <= 1e-2 * movement, key
    assert AutoModelForCausalLM.from_pretrained(run / "hf").num_parameters() > 0


def test_a_run_whose_rank_is_killed_ends_by_name_and_goes_on_bit_for_bit(cut, model, tmp_path):
    (undisturbed, _), (processes, layout, _) = cut("tp=2 pp=2"), CUTS["tp=2 pp=2"]
    options = settings(model, "learner=megatron", *layout)
    job = torchrun(tmp_path, FAILS, "killed", "train", *options, processes=processes)
    assert job.returncode != 0
    cause = job.stderr[job.stderr.index("Root Cause") :]
    assert f"rank      : {processes - 1} " in cause
    assert "exitcode  : -9" in cause
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000001"]
    job = torchrun(tmp_path, "-m", "fastgrpo", "train", *options, "resume=auto", processes=processes)
    assert job.returncode == 0, job.stderr[-4000:]
    assert "resuming after step 1 from run/checkpoints/step-000001\n" in job.stdout
    assert rows_of(tmp_path / "run") == rows_of(undisturbed)
    assert sorted(path.name for path in (undisturbed / "profile").iterdir()) == [
        "step-000002-rank-3.json.gz",
        "step-000002-rank-3.txt",
    ]
    files = [run / "hf/model.safetensors" for run in (tmp_path / "run", undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_rank_that_raises_is_heard_before_those_that_waited_for_it(model, tmp_path):
    job = torchrun(tmp_path, FAILS, "raises", "train", *settings(model, "learner=megatron", "learner.tp=2"))
    assert job.returncode != 0
    own = job.stderr.index("RuntimeError: this rank has lost its way")
    assert job.stderr.index("Traceback") < own
    assert job.stderr[:own].count("Traceback") == 1
    assert "rank      : 1 " in job.stderr[job.stderr.index("Root Cause") :]


def test_vllm_cut_alike_computes_with_the_learners_memory_on_every_rank(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    model = save_tiny_model(tmp_path / "model", "qwen3", hidden_size=128, head_dim=32)  # vLLM wants heads of 32 or more
    both = ("learner=megatron", "learner.tp=2", "sampler=vllm", "sampler.tp=2", "train.learning_rate=0.01")
    job = torchrun(tmp_path, "-m", "fastgrpo", "train", *settings(model, *both))
    assert job.returncode == 0, job.stderr[-4000:]
    (line,) = (line for line in job.stdout.splitlines() if line.startswith("weights of vLLM: "))
    assert line.endswith(" MB shared")  # and nothing copied or from other ranks
    assert "not shared" not in job.stdout
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["grad_norm"] > 0
        assert row["updates/skipped"] == 0
        assert 0 < row["sampler_mismatch/max_abs"] < 2e-5
        assert {f"memory/{phase}_begin_bytes" for phase in ("rollout", "train", "share")} <= row.keys()
