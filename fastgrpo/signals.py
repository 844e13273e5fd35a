"""Ctrl-C, SIGTERM, a terminal that is closed and the time limit end a run after a step; a second signal at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from fastgrpo.time_limit import TIME_IS_UP, TimeLimit

if TYPE_CHECKING:
    from fastgrpo.run import Run


@contextmanager
def noting_ctrl_c() -> Iterator[list[int]]:
    """Notes each Ctrl-C beside raising KeyboardInterrupt, as which it does not always arrive."""
    interrupts: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        signal.default_int_handler(signum, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored in a shell's background, or a caller's own
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


class StopRequest:
    """A context manager; `code` is the exit code of what stops the run, on all ranks the same, or None.

    What comes after the last step's `asked` stops nothing any more: the ranks go on to the policy's export together.
    """

    def __init__(self, notify: Callable[[str], object], limit: TimeLimit | None = None) -> None:
        self.code: int | None = None
        self._mine: int | None = None
        self._received = False
        self._notify, self._limit = notify, limit
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup's, or a caller's own
            asking.append(signal.SIGHUP)
        try:
            self._previous = {s: signal.signal(s, self._receive) for s in asking}
        except ValueError:  # not in the main thread, as in some notebooks: signals stay the caller's
            self._previous = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def asked(self, run: Run) -> bool:
        """Whether to stop, alike on every rank: a signal reaches the processes of a job one after the other, and each
        has a clock of its own."""
        if self._mine is None and self._limit is not None and self._limit.ends(run):
            self._mine = TIME_IS_UP
        self.code = run.learner.ranks.any_of(self._mine)
        if self.code == TIME_IS_UP:
            minutes = run.config.train.time_limit_minutes
            self._notify(f"train.time_limit_minutes={minutes:g}: another step might not end in time; saving this one")
        return self.code is not None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        self._mine = self._mine or 128 + signum
        name = signal.Signals(signum).name
        self._notify(f"{name}: finishing this step and saving; once more stops at once, without saving")
