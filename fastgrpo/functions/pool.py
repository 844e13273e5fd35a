"""Who makes the calls: worker processes that can be killed, or threads of this process. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import popen_spawn_posix, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Protocol

import cloudpickle
from pebble import ProcessExpired, ProcessPool

from fastgrpo.config import UserError
from fastgrpo.functions.calls import Outcome, run_calls
from fastgrpo.functions.contract import Failure, UserFunction
from fastgrpo.functions.lane import POLL_S, Begun, Lane, Ticket, each_of
from fastgrpo.functions.worker import Shipment, answer, initialize

GRACE_S = 1.0
"""Async calls are given up on by their own event loop; this much later the loop itself counts as stuck."""

MAX_RESTARTS = 3


class Executor(Protocol):
    """Runs calls of the functions it was made with."""

    def submit(self, index: int, calls: list[dict[str, Any]]) -> Ticket:
        """Starts the calls of function number `index`; they share one fate where it exceeds its limit.

        Those of an async function are made all at once, and with them whatever else is submitted for it while all
        workers are busy (lane.py).
        """

    def close(self) -> None:
        """Ends everything that was started."""


def _lanes(
    functions: Sequence[UserFunction], begin: Callable[[int, list[dict[str, Any]]], Begun], *, limit: int
) -> dict[int, Lane]:
    """One for each async function, by its number."""
    return {i: Lane(partial(begin, i), limit=limit) for i, function in enumerate(functions) if function.is_async}


class ProcessExecutor:
    """`num_workers` processes; one that exceeds the limit is killed, with all it started, and replaced."""

    def __init__(self, functions: Sequence[UserFunction], *, by_path: list[bool], num_workers: int, timeout_s: float):
        self._functions = functions
        self._shipments = [_ship(f, path) for f, path in zip(functions, by_path, strict=True)]
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._lanes = _lanes(functions, self._begin, limit=num_workers)
        self._start()

    def _start(self) -> None:
        self._context = _WorkerContext()
        self._pool = ProcessPool(
            max_workers=self._num_workers,
            initializer=initialize,
            initargs=(os.getpid(), self._shipments),
            context=self._context,
        )
        self._closed = threading.Event()
        started: Future[None] = Future()
        # Linux ties a worker's life to the thread that started it; this one lives as long as the pool.
        args = (self._pool, started, self._closed)
        threading.Thread(target=_start_and_stay, args=args, daemon=True, name="function-workers").start()
        started.result()

    def submit(self, index: int, calls: list[dict[str, Any]]) -> Ticket:
        if index in self._lanes:
            return self._lanes[index].submit(calls)
        return partial(each_of, self._begin(index, calls), len(calls))

    def _begin(self, index: int, calls: list[dict[str, Any]]) -> Begun:
        pool, future = self._schedule(index, calls)

        def wait() -> list[Outcome] | Failure:
            nonlocal pool, future
            for _ in range(MAX_RESTARTS):
                try:
                    return _outcomes(pool, future)
                except BrokenProcessPool:  # the calls were still in the queue: making them again repeats nothing
                    pool, future = self._schedule(index, calls)
            return Failure("error", "the worker processes keep being killed from outside")

        return Begun(future=future, is_over=lambda: future.done() or not pool.active, wait=wait)

    def _schedule(self, index: int, calls: list[dict[str, Any]]) -> tuple[ProcessPool, Future]:
        function = self._functions[index]
        how = {"is_async": function.is_async, "read": function.read, "timeout_s": self._timeout_s}
        timeout = self._timeout_s + (GRACE_S if function.is_async else 0.0)
        if not self._pool.active:  # an idle worker was killed from outside, which pebble does not survive
            self.close()
            self._start()
        return self._pool, self._pool.schedule(answer, args=(index, calls), kwargs=how, timeout=timeout)

    def close(self) -> None:
        self._pool.stop()
        self._context.kill_workers()  # before pebble takes from those that still start what they would miss aloud
        self._pool.join()
        self._closed.set()


def _start_and_stay(pool: ProcessPool, started: Future, closed: threading.Event) -> None:
    try:
        pool.schedule(os.getpid)
        started.set_result(None)
    except BaseException as error:
        started.set_exception(error)
    closed.wait()


def _outcomes(pool: ProcessPool, future: Future) -> list[Outcome] | Failure:
    """Waits. Raises BrokenProcessPool where the pool ended before it made the calls."""
    while True:
        try:
            return future.result(POLL_S if pool.active else 0.0)
        except FutureTimeoutError:  # this wait's, or the call's
            if future.done():
                if isinstance(future.exception(), FutureTimeoutError):
                    return Failure("timeout", "")
            elif not pool.active:  # calls that it had not sent yet would never be answered
                raise BrokenProcessPool from None
        except ProcessExpired as error:
            with suppress(ProcessLookupError):  # it had started nothing
                os.killpg(error.pid, signal.SIGKILL)
            return Failure("error", f"the worker process died with exit code {error.exitcode}")


def _ship(function: UserFunction, by_path: bool) -> Shipment:
    if by_path:
        return Shipment(function.key, function.path, None)
    try:
        return Shipment(function.key, function.path, cloudpickle.dumps(function.function))
    except Exception as error:  # pickling runs code of whatever the function holds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{function.path} cannot be sent to worker processes ({reason}); set {function.section}.num_workers=0"
        ) from error


class ThreadExecutor:
    """Threads of this process. A call that exceeds the limit is given up on but cannot be ended.

    Functions run one call at a time, so they need not be thread-safe; async ones all at once.
    """

    def __init__(self, functions: Sequence[UserFunction], *, timeout_s: float):
        self._functions = functions
        self._timeout_s = timeout_s
        self._lanes = _lanes(functions, self._begin, limit=1)

    def submit(self, index: int, calls: list[dict[str, Any]]) -> Ticket:
        if index in self._lanes:
            return self._lanes[index].submit(calls)
        return lambda: each_of(self._begin(index, calls), len(calls))

    def _begin(self, index: int, calls: list[dict[str, Any]]) -> Begun:
        future = self._start(index, calls)
        end = time.monotonic() + self._timeout_s + (GRACE_S if self._functions[index].is_async else 0.0)

        def wait() -> list[Outcome] | Failure:
            try:
                return future.result(max(0.0, end - time.monotonic()))
            except FutureTimeoutError:
                return Failure("timeout", "")

        return Begun(future=future, is_over=lambda: future.done() or time.monotonic() >= end, wait=wait)

    def _start(self, index: int, calls: list[dict[str, Any]]) -> Future:
        function, future = self._functions[index], Future[list[Outcome] | Failure]()

        def run() -> None:
            how = {"is_async": function.is_async, "read": function.read, "timeout_s": self._timeout_s}
            future.set_result(run_calls(function.function, calls, **how))  # type: ignore[arg-type]

        threading.Thread(target=run, daemon=True, name=f"function-{function.path}").start()
        return future

    def close(self) -> None:
        """Nothing to end: the threads are daemons."""


class _WorkerPopen(popen_spawn_posix.Popen):
    """Starts a worker that sees neither a Ctrl-C before it can handle it, nor the trainer's main module.

    multiprocessing would import the main module again in every worker: all of torch for `fastgrpo train`, and the
    whole training script for a notebook's user who did not guard it by `if __name__ == "__main__"`.
    """

    def _launch(self, process_obj: Any) -> None:
        with _sigint_blocked(), _main_module_left_out():
            super()._launch(process_obj)  # type: ignore[misc]


class _WorkerProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        return _WorkerPopen(process_obj)

    def terminate(self) -> None:
        """Kills the worker and all it started, at once: one stuck in C code would not heed a gentler signal."""
        if not self.is_alive():
            return
        assert self.pid is not None
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # too young to have its own group
            self.kill()


class _WorkerContext(SpawnContext):
    """Knows the workers that it started."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[_WorkerProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> _WorkerProcess:  # type: ignore[override]  # noqa: N802
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        self._workers.append(_WorkerProcess(*args, **kwargs))
        return self._workers[-1]

    def kill_workers(self) -> None:
        for worker in self._workers:
            worker.terminate()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A child inherits its creating thread's signal mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_launch_lock = threading.Lock()


@contextmanager
def _main_module_left_out() -> Iterator[None]:
    """Only for processes that this thread launches meanwhile."""
    with _launch_lock:
        original, launching = spawn.get_preparation_data, threading.get_ident()

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            if threading.get_ident() == launching:
                data.pop("init_main_from_name", None)
                data.pop("init_main_from_path", None)
            return data

        spawn.get_preparation_data = without_main
        try:
            yield
        finally:
            spawn.get_preparation_data = original
