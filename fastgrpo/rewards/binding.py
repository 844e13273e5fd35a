"""From a group to the keyword arguments of each call. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.rewards.contract import RewardFunction


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A group as plain values. Example: Sample(prompt_id="train/17", prompt="2+3=", answer="5", metadata={},
    completions=["5", "6"], token_ids=[[8, 2], [9, 2]], finish_reasons=["stop", "stop"])."""

    prompt_id: str
    prompt: str
    answer: Any
    metadata: dict[str, Any]
    completions: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]


def bind(function: RewardFunction, sample: Sample) -> list[dict[str, Any]]:
    """The keyword arguments of the function's calls: one call per completion, or one for the group.

    Configured arguments come before columns of the same name. Raises UserError for a parameter that nothing fills.
    """
    shared = {"prompt": sample.prompt, "answer": sample.answer, "metadata": dict(sample.metadata)}
    filled = {**shared, **_columns(function, sample), **function.kwargs}
    wanted = {name: value for name, value in filled.items() if function.takes_columns or name in function.parameters}
    if function.takes_columns:  # **kwargs gets columns, and of the rest only what is asked for by name
        wanted = {name: value for name, value in wanted.items() if name not in shared or name in function.parameters}
    missing = [name for name in function.required if name not in wanted and name not in function.offered]
    if missing:
        columns = ", ".join(sample.metadata) or "none"
        raise UserError(
            f"{function.key}={function.path} asks for `{missing[0]}`, which is neither one of "
            f"{', '.join(function.offered)} nor a column of the data ({columns}); rename it, give it a default or set "
            f"{function.key.removesuffix('path').removesuffix('.')}.kwargs.{missing[0]}"
        )
    return [{**wanted, **own} for own in _own_arguments(function, sample)]


def _columns(function: RewardFunction, sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in sample.metadata.items() if name not in function.offered}


def _own_arguments(function: RewardFunction, sample: Sample) -> list[dict[str, Any]]:
    """What differs between the calls."""
    if function.per_group:
        values = [(sample.completions, sample.token_ids, sample.finish_reasons)]
        names = ("completions", "token_ids", "finish_reasons")
    else:
        values = list(zip(sample.completions, sample.token_ids, sample.finish_reasons, strict=True))  # type: ignore[arg-type]
        names = ("completion", "token_ids", "finish_reason")
    return [
        {name: value for name, value in zip(names, row, strict=True) if name in function.parameters} for row in values
    ]
