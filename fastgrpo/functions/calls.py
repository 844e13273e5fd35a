"""Makes the calls, in a worker process or in the trainer's own. Imports no torch."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.contract import Failure

Read = Callable[[Any], Any]
Outcome = Any
"""What one call came to: what the function's `read` made of its result, or the Failure that left none."""


def run_calls(
    function: Callable[..., Any], calls: list[dict[str, Any]], *, is_async: bool, read: Read, timeout_s: float
) -> list[Outcome] | Failure:
    """Calls the function with each set of keyword arguments: one after the other, or all at once if it is async, where
    one that ends the event loop leaves no outcome at all.

    Only the async calls are held to timeout_s here; who runs this holds the others to it.
    """
    if is_async:
        try:
            return asyncio.run(_run_together(function, calls, read, timeout_s))
        except BaseException as error:
            return failure_of(error)
    return [_run_one(function, arguments, read) for arguments in calls]


def _run_one(function: Callable[..., Any], arguments: dict[str, Any], read: Read) -> Outcome:
    try:
        return read(function(**arguments))
    except BaseException as error:
        return failure_of(error)


async def _run_together(
    function: Callable[..., Any], calls: list[dict[str, Any]], read: Read, timeout_s: float
) -> list[Outcome]:
    async def run_one(arguments: dict[str, Any]) -> Outcome:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                result = await function(**arguments)
            return read(result)
        except BaseException as error:
            return Failure("timeout", "") if limit.expired() else failure_of(error)

    return list(await asyncio.gather(*(run_one(arguments) for arguments in calls)))


def failure_of(error: BaseException) -> Failure:
    """One line that says what was raised and where. Exceptions themselves need not survive a change of process."""
    if isinstance(error, UserError):
        return Failure("refused", str(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return Failure("error", (message if len(message) <= 200 else message[:197] + "...") + place)
