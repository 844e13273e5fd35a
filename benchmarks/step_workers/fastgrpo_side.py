"""Our side: the product's own entry point and loop, fastgrpo.commands.train and fastgrpo.trainer.train.

The loop is stopped at the border of every step through the console, the last thing it calls in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastgrpo.commands
from fastgrpo import trainer
from fastgrpo.config import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    TrainConfig,
)
from fastgrpo.run import Run
from fastgrpo.signals import StopRequest
from step_workers.case import Case, EvenShare
from step_workers.gate import Gate

PARTS = ("generate", "reward", "logprobs", "update")
NEVER = 1_000_000
"""More steps than are ever asked for."""


def configuration(case: Case, sampler: str = "torch") -> Config:
    """The product's defaults but for what the case says; nothing is written but metrics and samples."""
    group_tokens = case.prompt_length + case.group_size * case.new_tokens
    return Config(
        run=RunConfig(dir=str(Path(case.directory) / f"run-{sampler}"), console="none", trackers=[]),
        model=ModelConfig(path=case.model_path),
        data=DataConfig(
            source="jsonl",
            path=case.prompts_path,
            prompt_column="prompt",
            answer_column=None,
            eval_size=0,
            shuffle=False,
        ),
        # In the trainer's own process, where TRL has its reward function too.
        reward=RewardConfig(num_workers=0),
        algorithm=AlgorithmConfig(
            group_size=case.group_size,
            kl_coef=0.0,
            clip_ratio_low=case.clip_ratio,
            clip_ratio_high=case.clip_ratio,
        ),
        sampling=SamplingConfig(max_new_tokens=case.new_tokens, min_new_tokens=case.new_tokens),
        train=TrainConfig(
            num_steps=NEVER,
            prompts_per_step=case.prompts_per_step,
            learning_rate=case.learning_rate,
            max_grad_norm=case.max_grad_norm,
        ),
        learner=LearnerConfig(max_tokens_per_microbatch=case.groups_per_microbatch * group_tokens),
        sampler=SamplerConfig(kind=sampler),
        cluster=ClusterConfig(device="cpu", dtype="float32"),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
    )


def run(case: Case, gate: Gate, sampler: str = "torch") -> None:
    """Train until the gate says stop."""
    reward, loop = EvenShare(), trainer.train

    def gated(run: Run, stop: StopRequest) -> None:
        counting = CountingLearner(run.learner)
        run.learner = counting
        run.console = GatedConsole(run, gate, reward, counting)
        loop(run, stop)

    run_with(gated, configuration(case, sampler), reward.fastgrpo)


def run_with(loop: Callable[[Run, StopRequest], None], config: Config, reward: Callable[..., list[float]]) -> None:
    """What `fastgrpo train` calls, fastgrpo.commands.train, with `loop` in the place of fastgrpo.trainer.train."""
    product, trainer.train = trainer.train, loop
    try:
        fastgrpo.commands.train(config, "", reward)
    finally:
        trainer.train = product


class CountingLearner:
    """The run's learner, which also notes how many rows it was given."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.num_rows = self.num_scored = 0

    def update(self, batches: Iterable, objective: Any) -> Any:
        batches = list(batches)
        self.num_rows = sum(batch.num_tokens for batch in batches)
        self.num_scored = sum(batch.num_scored for batch in batches)
        return self._learner.update(batches, objective)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)


class GatedConsole:
    """Stands where the run's console is: the loop calls it with every step's row, and once before the first."""

    def __init__(self, run: Run, gate: Gate, reward: EvenShare, learner: CountingLearner) -> None:
        self._ledger, self._gate, self._reward, self._learner = run.ledger, gate, reward, learner

    def step(self, row: Mapping[str, Any]) -> None:
        completion_tokens = self._reward.take_count()
        if row["step"] == 0:
            self._gate.ready(version("fastgrpo"))
        else:
            self._gate.done(
                parts={part: row[f"time/{part}_s"] for part in PARTS},
                counts={
                    "sequence_tokens": row["tokens"],
                    "completion_tokens": completion_tokens,
                    "scored_tokens": self._learner.num_scored,
                    "learner_rows": self._learner.num_rows,
                },
            )
        self._ledger.step()  # the wait for the next command belongs to no step

    def message(self, text: str) -> None:
        raise RuntimeError(text)  # the loop speaks up where an update was skipped: such a step does not count
