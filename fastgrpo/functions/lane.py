"""Calls of an async function on their way to the workers, each of which makes all calls of a batch at once.

A worker answers one batch at a time. So what is submitted while all of them are busy makes up the next batches, and
where calls come one by one, thousands of them still take few: hardly anybody's calls stand in line behind each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fastgrpo.functions.calls import Outcome
from fastgrpo.functions.contract import Failure

POLL_S = 1.0

AT_ONCE = 256
"""Calls of a batch: all run down their time limits together, on one processor, and each may hold a connection."""

Ticket = Callable[[], list[Outcome]]
"""Waits for the calls."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A batch of calls that a worker has."""

    future: Future
    """Done at the latest when the calls are."""
    is_over: Callable[[], bool]
    """Whether `wait` need not wait, or has to see to something."""
    wait: Callable[[], list[Outcome] | Failure]
    """What every call came to, or what kept the worker from answering at all."""


def each_of(begun: Begun, num_calls: int) -> list[Outcome]:
    """Waits; a failure of the worker is one of each of its calls."""
    outcomes = begun.wait()
    return [outcomes] * num_calls if isinstance(outcomes, Failure) else outcomes


class Lane:
    """Makes batches of what is submitted. begin: hands one to a worker. limit: how many there are. For one thread."""

    def __init__(self, begin: Callable[[list[dict[str, Any]]], Begun], *, limit: int) -> None:
        self._begin, self._limit = begin, limit
        self._waiting: list[_Item] = []
        self._alone: list[_Item] = []
        """To be asked again, each in a batch of its own."""
        self._running: list[tuple[Begun, list[_Item]]] = []

    def submit(self, calls: list[dict[str, Any]]) -> Ticket:
        """Calls that share one fate where their worker fails."""
        item = _Item(calls)
        self._waiting.append(item)
        self._go_on()
        return lambda: self._outcomes_of(item)

    def _outcomes_of(self, item: _Item) -> list[Outcome]:
        while item.outcomes is None:
            wait([begun.future for begun, _ in self._running], timeout=POLL_S, return_when=FIRST_COMPLETED)
            self._go_on()
        return item.outcomes

    def _go_on(self) -> None:
        """Take in what is over, and hand out what waits."""
        for batch in [batch for batch in self._running if batch[0].is_over()]:
            self._take_in(*batch)
            self._running.remove(batch)  # only now: what raises is to raise again where it is waited for
        while len(self._running) < self._limit and (queue := self._alone or self._waiting):
            items = self._alone[:1] or self._next()
            self._running.append((self._begin([call for item in items for call in item.calls]), items))
            del queue[: len(items)]

    def _next(self) -> list[_Item]:
        """As many of those that wait as may run at once, or a single one that is larger."""
        sizes = accumulate(len(item.calls) for item in self._waiting)
        return [item for item, size in zip(self._waiting, sizes, strict=True) if size <= AT_ONCE] or self._waiting[:1]

    def _take_in(self, begun: Begun, items: list[_Item]) -> None:
        outcomes = begun.wait()
        if isinstance(outcomes, Failure) and len(items) > 1:
            self._alone += items  # one of them has held up or ended the worker: the others are not to suffer for it
            return
        answers = iter(outcomes if isinstance(outcomes, list) else [outcomes] * len(items[0].calls))
        for item in items:
            item.outcomes = [next(answers) for _ in item.calls]


@dataclass(eq=False)
class _Item:
    calls: list[dict[str, Any]]
    outcomes: list[Outcome] | None = None
