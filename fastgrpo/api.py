"""fastgrpo from Python: train on one's own prompts and reward function in a notebook or a script."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError

HELD_OUT = 0.1
"""The share of the prompts that is held out where data.eval_size does not say."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Example: TrainResult(run_dir=Path("runs/mine"), metrics=[{"step": 0, ...}, ...])."""

    run_dir: Path
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl, one a step."""
    stopped: bool = False
    """A signal or train.time_limit_minutes ended it early: saved, to go on with resume=auto, and without a policy at
    model_path."""

    @property
    def model_path(self) -> Path:
        """The trained policy, a Hugging Face directory."""
        return self.run_dir / "hf"


def train(
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    reward: Callable[..., Any] | None = None,
    overrides: Sequence[str] = (),
    environment: Callable[..., Any] | None = None,
) -> TrainResult:
    """Train a policy; returns when it is done, or when a signal or train.time_limit_minutes has stopped it.

    prompts: texts, or mappings with a column `question` and, if the reward needs it, `answer` and others (or as
        data.prompt_column and data.answer_column name them); None trains on the configured data.
    reward: a function under the contract of fastgrpo.rewards; None takes the configured one.
    overrides: what one would write behind `fastgrpo train`, such as ["model.path=DIR", "train.num_steps=50"].
    environment: a function that answers the policy's turns (docs/environment.md); None takes the configured one.
    Raises UserError, one line, for whatever can be mended.
    """
    from fastgrpo import commands
    from fastgrpo.main import compose, setting, value_of, with_run_dir, with_shorthands
    from fastgrpo.metrics import read_jsonl

    began = time.monotonic()
    if isinstance(overrides, str):
        raise UserError(f"overrides: {overrides!r:.60} is one text; give a list of KEY=VALUE texts")
    with tempfile.TemporaryDirectory() as directory:
        arguments = list(overrides)
        if prompts is not None:
            path = Path(directory) / "prompts.jsonl"
            column = value_of(arguments, "data.prompt_column") or "question"
            rows = _rows(prompts, column)
            path.write_text("".join(map(_line, rows)), encoding="utf-8")
            # Where some have an answer and some do not, the data's own refusal names the first without.
            answers = [] if any("answer" in row for row in rows) else ["data.answer_column=null"]
            held_out = f"data.eval_size={int(HELD_OUT * len(rows))}"
            arguments = ["data=jsonl", setting("data.path", path), held_out, *answers, *arguments]
        config, text = compose("train", with_run_dir(with_shorthands(arguments)))
        code, run_dir = commands.train(config, text, reward, environment, began=began)
    return TrainResult(run_dir=run_dir, metrics=read_jsonl(run_dir / "metrics.jsonl"), stopped=code is not None)


def _rows(prompts: Sequence[str | Mapping[str, Any]], column: str) -> list[dict[str, Any]]:
    # Both can be gone through: a text letter by letter, a pandas.DataFrame by the names of its columns.
    if isinstance(prompts, str | Mapping) or hasattr(prompts, "iterrows"):
        raise UserError(
            f"prompts: a {type(prompts).__name__} is no list of prompts; give a list of texts or of mappings of columns"
        )
    rows = [_row(prompt, column) for prompt in prompts]
    if not rows:
        raise UserError("prompts: an empty list; give at least one, or None for the configured data")
    return rows


def _row(prompt: str | Mapping[str, Any], column: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {column: prompt}
    if isinstance(prompt, Mapping):
        return dict(prompt)
    raise UserError(f"prompts: {prompt!r} is neither a text nor a mapping of columns")


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"prompts: {row!r:.80} holds what JSON cannot ({error}); give texts, numbers or lists"
        ) from None


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays, which data sets are full of."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
