"""A limit of the run's time, for jobs that end at an hour that is known: no step is begun that would not end before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrpo.run import Run

TIME_IS_UP = 124
"""The exit code, timeout(1)'s."""


class TimeLimit:
    """What another step would take is judged by the longest so far; not by the first, which carries the run's start,
    where there are others.

    From one step's end to the next's there is the checkpoint of the one and the evaluation of the other, where they are
    due. Each process judges by its own clock (StopRequest makes them agree).
    """

    def __init__(self, minutes: float | None, began: float, *, clock: Callable[[], float] | None = None) -> None:
        """minutes: train.time_limit_minutes, after `began` by the clock (time.monotonic)."""
        self._clock = clock or time.monotonic
        self._end = math.inf if minutes is None else began + 60 * minutes
        self._asked: float | None = None
        self._steps: list[float] = []

    def ends(self, run: Run) -> bool:
        """Whether to stop, asked before the first step, which is made in any case so that a run that is started again
        and again gets on, and at the end of each, before it is saved. After the last there is nothing to stop."""
        now = self._clock()
        if self._asked is not None:
            self._steps.append(now - self._asked)
        self._asked = now
        if not self._steps or run.step == run.config.train.num_steps:
            return False
        step, save = max(self._steps[1:] or self._steps), run.checkpoints.longest_s or 0.0
        return now + step + save > self._end
