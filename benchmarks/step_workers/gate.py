"""One side in its own process, which takes one step each time it is told to.

The worker's Gate sits at the border between two steps of a real training loop: it reports the step that ended and
blocks until the next one is wanted, so the clock covers everything a step does, from border to border.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from step_workers.case import Case

SIDES = {"fastgrpo": "fastgrpo_side", "fastgrpo-vllm": "fastgrpo_vllm_side", "trl": "trl_side", "gemm": "floor"}
STEP, STOP = "step", "stop"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step took. Example: StepReport(seconds=1.2, parts={"generate": 0.4, "other": 0.8})."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by what they were spent on; they add up to `seconds`."""
    counts: dict[str, int] = field(default_factory=dict)
    """sequence_tokens, completion_tokens, scored_tokens, learner_rows of this step."""
    peak_rss_bytes: int = 0
    """The process's high-water mark so far, imports included."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The side has made everything and waits for its first step."""

    rss_bytes: int
    version: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    text: str


class Finished(BaseException):
    """Ends a training loop from inside; not an Exception, so that no loop's own error handling keeps it."""


class Gate:
    """The worker's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the step was asked for."""
        return time.perf_counter() - self._start

    def ready(self, version: str) -> None:
        self._connection.send(Ready(rss_bytes=_memory("VmRSS"), version=version))
        self._wait()

    def done(self, parts: dict[str, float], counts: dict[str, int]) -> None:
        """Report a step; `parts` need not hold `other`, which is what they leave of the time."""
        seconds = self.elapsed
        parts = {**parts, "other": seconds - sum(parts.values())}
        self._connection.send(StepReport(seconds=seconds, parts=parts, counts=counts, peak_rss_bytes=_memory("VmHWM")))
        self._wait()

    def _wait(self) -> None:
        if self._connection.recv() == STOP:
            raise Finished
        self._start = time.perf_counter()


class Side:
    """The parent's end: starts the worker and waits until it is ready. A context manager."""

    def __init__(self, provider: str, case: Case) -> None:
        self.provider = provider
        context = multiprocessing.get_context("spawn")  # a fork would share the parent's memory and threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(provider, case, theirs), daemon=True, name=provider)
        self._process.start()
        theirs.close()
        self.ready: Ready = self._receive()

    def step(self) -> StepReport:
        self._connection.send(STEP)
        return self._receive()

    def _receive(self):
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            message = Failed(text=f"the worker died with exit code {self._process.exitcode}")
        if isinstance(message, Failed):
            raise RuntimeError(f"{self.provider}: {message.text}")
        return message

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # it may be gone already
            self._connection.send(STOP)
        self._process.join(30)
        self._process.kill()


def _serve(provider: str, case: Case, connection: Connection) -> None:
    try:
        importlib.import_module(f"step_workers.{SIDES[provider]}").run(case, Gate(connection))
    except (Finished, KeyboardInterrupt):
        pass
    except BaseException:
        connection.send(Failed(text=traceback.format_exc()))


def _memory(field_name: str) -> int:
    """VmRSS or VmHWM of this process. ru_maxrss would not do: it starts from the parent's."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field_name + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}; this benchmark needs Linux")
