"""Makes the calls, in a worker process or in the trainer's own. Imports no torch."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.rewards.contract import Failure, Unusable, Value, normalize

Outcome = list[Value] | Unusable | Failure
"""What one call came to: a value per completion it was given, or why there is none."""


def run_calls(
    function: Callable[..., Any], calls: list[dict[str, Any]], *, is_async: bool, per_group: bool, timeout_s: float
) -> list[Outcome]:
    """Calls the function with each set of keyword arguments: one after the other, or all at once if it is async.

    Only the async calls are held to timeout_s here; who runs this holds the others to it.
    """
    if is_async:
        return asyncio.run(_run_together(function, calls, per_group, timeout_s))
    return [_run_one(function, arguments, per_group) for arguments in calls]


def _run_one(function: Callable[..., Any], arguments: dict[str, Any], per_group: bool) -> Outcome:
    try:
        return normalize(function(**arguments), per_group=per_group)
    except BaseException as error:
        return _failure(error)


async def _run_together(
    function: Callable[..., Any], calls: list[dict[str, Any]], per_group: bool, timeout_s: float
) -> list[Outcome]:
    async def run_one(arguments: dict[str, Any]) -> Outcome:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                result = await function(**arguments)
            return normalize(result, per_group=per_group)
        except BaseException as error:
            return Failure("timeout", "") if limit.expired() else _failure(error)

    return list(await asyncio.gather(*(run_one(arguments) for arguments in calls)))


def _failure(error: BaseException) -> Failure:
    """One line that says what was raised and where. Exceptions themselves need not survive a change of process."""
    if isinstance(error, UserError):
        return Failure("refused", str(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return Failure("error", (message if len(message) <= 200 else message[:197] + "...") + place)
