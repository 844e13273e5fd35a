"""Ctrl-C, SIGTERM and a terminal that is closed end a run after the step they arrive in; a second one at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrpo.ranks import Ranks


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
    """A context manager; `signum` is the signal that asked the run to stop, or None."""

    def __init__(self, notify: Callable[[str], object]) -> None:
        self.signum: int | None = None
        self._notify = notify
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

    def asked(self, ranks: Ranks) -> bool:
        """Whether to stop, alike on every rank: a signal reaches the processes of a job one after the other."""
        self.signum = ranks.any_of(self.signum)
        return self.signum is not None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        name = signal.Signals(signum).name
        self._notify(f"{name}: finishing this step and saving; once more stops at once, without saving")
