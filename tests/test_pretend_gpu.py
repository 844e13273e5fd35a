"""Whole runs on a device that is not the CPU, as far as they can be made without one: see pretend_gpu.py."""

import json
from pathlib import Path

import pytest
from builders import save_tiny_model, small_run
from pretend_gpu import NUM_WAITS, install
from processes import fastgrpo
from runs import without_clock

from fastgrpo.metrics import read_jsonl

OBJECTIVES = Path(__file__).with_name("example_objectives.py")
RUNS = {
    "reference": ("qwen2", "algorithm.kl_coef=0.05", "algorithm.reference.schedule=ema", "sampling.top_p=0.9"),
    "minibatches": ("llama", "train.num_minibatches=2", "learner.max_tokens_per_microbatch=40", "algorithm=dapo"),
    "stragglers": (
        "qwen3",
        "algorithm=gspo",
        "algorithm.importance_level=sequence",
        "sampler.oversample=0.5",
        "sampler.round_tokens=3",
        "learner.offload=always",
    ),
    "experts": ("qwen3_moe", "train.moe_aux_loss_coef=0.01", "algorithm.top_entropy_quantile=0.5"),
    "adapters and a surrogate of one's own": (
        "qwen2",
        "model.lora.rank=2",
        f"algorithm.surrogate={OBJECTIVES}:geometric_mean",
        "algorithm.kl_coef=0.0",
        "train.updates_per_rollout=2",
    ),
}


def rows(directory: str) -> list[dict]:
    return without_clock(read_jsonl(Path(directory) / "metrics.jsonl"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_elsewhere_is_a_run_on_the_cpu(name, workplace):
    """Every tensor is where it is used, no operation is one that a deterministic GPU lacks, and an update waits for the
    device twice, however many micro-batches it has: for the gradient's norm and for its metrics."""
    kind, *more = RUNS[name]
    options = small_run(save_tiny_model(Path("model"), kind), *more, "checkpoint.every=1", "checkpoint.export=false")
    for where, how in (("cpu", None), ("elsewhere", install)):
        ended = fastgrpo("train", *options, f"run.dir={where}", install=how)
        assert ended.code == 0, ended.err
    assert len(rows("cpu")) == 3
    for there, here in zip(rows("elsewhere"), rows("cpu"), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-5)
    for line in NUM_WAITS.read_text().splitlines():
        update = json.loads(line)
        # The torch loss head, which a GPU's runs do not take, looks at every batch's weights and targets.
        of_the_head, of_routers = 2 * update["batches"], 4 * (kind == "qwen3_moe")
        assert sum(update["waits"].values()) == 2 + of_the_head + of_routers, update


def test_half_precision_takes_the_flash_kernels(workplace):
    """Sampler and learner agree as two kernels do in bfloat16; masters and moments leave and come back."""
    model = save_tiny_model(Path("model"), "qwen3")
    more = ("cluster.dtype=bfloat16", "learner.offload=always", "checkpoint.every=1", "checkpoint.background=true")
    ended = fastgrpo("train", *small_run(model, *more, "checkpoint.export=false"), install=install)
    assert ended.code == 0, ended.err
    for row in rows("run")[1:]:
        assert 0 < row["sampler_mismatch/mean_abs"] < 0.03
        assert row["grad_norm"] > 0
