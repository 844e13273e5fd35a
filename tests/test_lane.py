"""Batches of an async function's calls."""

from concurrent.futures import Future

import pytest

from fastgrpo.functions.contract import Failure
from fastgrpo.functions.lane import AT_ONCE, Begun, Lane


class Workers:
    """Answer when they are told to, each call in capitals; what is "bad" takes its worker down."""

    def __init__(self):
        self.batches, self._futures = [], []

    def begin(self, calls):
        batch, future = [call["turn"] for call in calls], Future()
        self.batches.append(batch)
        self._futures.append(future)
        died = Failure("error", "died")
        return Begun(
            future=future,
            is_over=future.done,
            wait=lambda: future.result() and (died if "bad" in batch else [turn.upper() for turn in batch]),
        )

    def finish(self, number):
        self._futures[number].set_result(True)


def submit(lane, *turns):
    return lane.submit([{"turn": turn} for turn in turns])


def test_what_comes_while_all_workers_are_busy_makes_up_the_next_batch():
    workers = Workers()
    lane = Lane(workers.begin, limit=2)
    tickets = [submit(lane, "a", "b"), submit(lane, "c"), submit(lane, "d"), submit(lane, "e", "f")]
    assert workers.batches == [["a", "b"], ["c"]]
    workers.finish(1)
    tickets.append(submit(lane, "g"))
    assert workers.batches[2:] == [["d", "e", "f", "g"]]
    workers.finish(0)
    workers.finish(2)
    assert [ticket() for ticket in tickets] == [["A", "B"], ["C"], ["D"], ["E", "F"], ["G"]]
    assert [ticket() for ticket in tickets[:2]] == [["A", "B"], ["C"]]


def test_those_beside_one_that_took_its_worker_down_are_asked_again():
    workers = Workers()
    lane = Lane(workers.begin, limit=1)
    tickets = [submit(lane, "a"), submit(lane, "b"), submit(lane, "c", "bad"), submit(lane, "d")]
    for number in range(5):
        workers.finish(number) if number < len(workers.batches) else None
        lane._go_on()
    late = submit(lane, "e")
    assert workers.batches == [["a"], ["b", "c", "bad", "d"], ["b"], ["c", "bad"], ["d"], ["e"]]
    workers.finish(5)
    died = Failure("error", "died")
    assert [ticket() for ticket in [*tickets, late]] == [["A"], ["B"], [died, died], ["D"], ["E"]]


def test_a_batch_is_of_no_more_calls_than_may_run_at_once():
    workers = Workers()
    lane = Lane(workers.begin, limit=1)
    for size in (1, AT_ONCE - 1, 1, 1, AT_ONCE + 1, 1):
        submit(lane, *"a" * size)
    for number in range(4):
        workers.finish(number)
        lane._go_on()
    assert [len(batch) for batch in workers.batches] == [1, AT_ONCE, 1, AT_ONCE + 1, 1]


@pytest.mark.parametrize("place", ["begin", "wait"])
def test_what_raises_once_loses_no_calls(place):
    """Whoever submits may have swallowed it, and then waits for what came before."""
    workers, broken = Workers(), []

    def fail_at(here):
        if here in broken:
            raise OSError(broken.pop())

    def begin(calls):
        fail_at("begin")
        begun = workers.begin(calls)
        return Begun(future=begun.future, is_over=begun.is_over, wait=lambda: fail_at("wait") or begun.wait())

    lane = Lane(begin, limit=1)
    tickets = [submit(lane, "a"), submit(lane, "b")]
    workers.finish(0)
    broken.append(place)
    with pytest.raises(OSError, match=place):
        submit(lane, "c")
    lane._go_on()
    workers.finish(1)
    assert [ticket() for ticket in tickets] == [["A"], ["B"]]
