"""The step benchmark: it runs, both sides do the same work, and they compute the same gradient."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgrpo.minibatch import make_minibatch
from fastgrpo.rollout import collect
from fastgrpo.trainer import compute_advantages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_step  # noqa: E402
from step_workers import fastgrpo_side  # noqa: E402
from step_workers.case import EvenShare, Shape, prepare  # noqa: E402
from step_workers.floor import step_flops  # noqa: E402
from step_workers.gate import Finished, StepReport  # noqa: E402
from step_workers.report import quantiles  # noqa: E402


@pytest.fixture
def case(tmp_path):
    made = replace(bench_step.make_case(7, smoke=True), directory=str(tmp_path))
    prepare(made)
    return made


def run_smoke(tmp_path, *providers: str, prompt_lengths: tuple[str, ...] = ("5", "9")) -> list[dict[str, str]]:
    out = tmp_path / "step.csv"
    command = [sys.executable, str(BENCHMARKS / "bench_step.py"), "--smoke", "--prompt-lengths", *prompt_lengths]
    command += ["--steps", "2", "--warmup", "1", "--threads", "1", "--out", str(out), "--providers", *providers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    for provider in providers:
        assert provider in done.stdout
    with open(out, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def value(rows, provider: str, metric: str, x: str, mode: str = "full") -> float:
    found = [r for r in rows if (r["provider"], r["metric"], r["x"], r["mode"]) == (provider, metric, x, mode)]
    assert len(found) == 1, (provider, metric, x, mode)
    return float(found[0]["p50"])


def test_both_sides_in_turns_give_a_complete_csv_with_equal_counts(tmp_path):
    pytest.importorskip("trl")
    rows = run_smoke(tmp_path, "fastgrpo", "trl")
    for x, prompt in (("5", 5), ("9", 9)):
        for provider in ("fastgrpo", "trl"):
            assert value(rows, provider, "completion_tokens", x) == 2 * 4 * 6
            assert value(rows, provider, "scored_tokens", x) == 2 * 4 * 6
            assert value(rows, provider, "sequence_tokens", x) == 2 * 4 * (prompt + 6)
            assert value(rows, provider, "peak_rss", x) > 0
            parts = [value(rows, provider, "time", x, part) for part in ("generate", "reward", "update")]
            assert min(parts) >= 0
            assert value(rows, provider, "time", x) > 0
        assert value(rows, "fastgrpo", "learner_rows", x) == 2 * (prompt + 4 * 5)
        assert value(rows, "trl", "learner_rows", x) == 2 * 4 * (prompt + 6)
        medians = value(rows, "trl", "time", x) / value(rows, "fastgrpo", "time", x)
        assert value(rows, "trl/fastgrpo", "speedup_of_medians", x) == pytest.approx(medians, rel=1e-4)
        assert value(rows, "fastgrpo", "share_of_floor", x) > 0
    assert all(row["gpu"] and row["timestamp"] and row["commit"] and row["versions"] for row in rows)


def test_our_side_runs_alone(tmp_path):
    rows = run_smoke(tmp_path, "fastgrpo", prompt_lengths=("5",))
    assert value(rows, "fastgrpo", "completion_tokens", "5") == 48
    assert {row["provider"] for row in rows} == {"fastgrpo", "gemm", "floor"}


def test_the_gradient_is_trls(case):
    """The same rollouts and advantages through TRL's own loss and through our learner."""
    pytest.importorskip("trl")
    from step_workers import trl_side

    groups, ours = [], {}

    def one_step(run, _):
        run.step = 1
        groups.extend(compute_advantages(run, collect(run)[0]))
        ours.update(gradients_of_an_update(run, groups))
        raise Finished  # before anything is exported

    with pytest.raises(Finished):
        fastgrpo_side.run_with(one_step, fastgrpo_side.configuration(case), EvenShare().fastgrpo)
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    prompts = [group.group.prompt.token_ids for group in groups for _ in group.group.rollouts]
    inputs = {
        "prompt_ids": torch.stack(prompts),
        "completion_ids": torch.stack([rollout.token_ids for rollout in rollouts]),
        "advantages": torch.cat([group.advantages for group in groups]),
    }
    masks = {name.replace("ids", "mask"): torch.ones_like(inputs[name]) for name in ("prompt_ids", "completion_ids")}
    trainer = trl_side.make_trainer(case, EvenShare().trl)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs | masks).backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert max(float(g.norm()) for g in theirs.values()) > 1e-3
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def gradients_of_an_update(run, groups) -> dict[str, torch.Tensor]:
    """What the learner's update hands to its optimizer."""
    found = {}

    def note(*_):
        found.update({name: p.grad.clone() for name, p in run.learner.model.named_parameters()})
        return torch.tensor(1.0)

    run.learner.optimizer.clip_grad_norm = note
    run.learner.update(make_minibatch(run, groups).batches, run.task.objective)
    return found


def test_both_configurations_say_the_same(case):
    pytest.importorskip("trl")
    from step_workers import trl_side

    ours, theirs = fastgrpo_side.configuration(case), trl_side.configuration(case)
    sequences = theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps
    assert sequences == ours.train.prompts_per_step * ours.algorithm.group_size
    assert theirs.steps_per_generation == theirs.gradient_accumulation_steps
    assert (theirs.learning_rate, theirs.max_grad_norm) == (ours.train.learning_rate, ours.train.max_grad_norm)
    assert (theirs.adam_beta1, theirs.adam_beta2) == (ours.train.adam_beta1, ours.train.adam_beta2)
    assert (theirs.adam_epsilon, theirs.weight_decay) == (ours.train.adam_eps, ours.train.weight_decay)
    assert theirs.epsilon == ours.algorithm.clip_ratio_low == ours.algorithm.clip_ratio_high
    assert theirs.beta == ours.algorithm.kl_coef == 0.0
    assert theirs.max_completion_length == ours.sampling.max_new_tokens
    assert theirs.generation_kwargs["min_new_tokens"] == ours.sampling.min_new_tokens == case.new_tokens


def test_a_step_with_other_token_counts_is_refused(case):
    counts = {"sequence_tokens": 104, "completion_tokens": 48, "scored_tokens": 48}
    bench_step.check_counts("trl", StepReport(seconds=1.0, counts=counts), case)
    with pytest.raises(RuntimeError, match="other work"):
        bench_step.check_counts("trl", StepReport(seconds=1.0, counts=counts | {"completion_tokens": 47}), case)


def test_the_flops_of_a_step_that_can_be_counted_by_hand():
    """One layer, one prompt of 2 tokens, 2 completions of 2: the rows are 2 prompt tokens and 1 of each completion."""
    shape = Shape(hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=8, vocab_size=10)
    case = replace(bench_step.make_case(2, smoke=True), shape=shape, prompts_per_step=1, group_size=2, new_tokens=2)
    layer = 16 + 8 + 8 + 16 + 32 + 32 + 32
    pairs = 3 + 2 * 3  # the prompt's own, and each completion's first token sees the prompt and itself
    attention = 4 * 4 * pairs
    expected = {
        "generate": 2 * layer * 4 + 2 * 40 * 3 + attention,
        "update": 6 * layer * 4 + 6 * 40 * 4 + 3 * attention,
    }
    assert step_flops(case) == expected


def test_quantiles():
    assert quantiles([4.0, 1.0, 3.0, 2.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_a_missing_trl_is_named(monkeypatch):
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(SystemExit, match="trl is not installed: `make bench`"):
        bench_step.main(["--smoke"])
