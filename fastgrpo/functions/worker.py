"""The inside of a worker process: load the functions once, then answer calls. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.calls import Outcome, Read, run_calls
from fastgrpo.functions.contract import Failure, section_of
from fastgrpo.functions.loading import load_function

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Shipment:
    """How a function gets into a worker: by path, or as cloudpickle's bytes."""

    key: str
    path: str
    pickled: bytes | None


_functions: list[Callable[..., Any] | Failure] = []


def initialize(parent_pid: int, shipments: list[Shipment]) -> None:
    """Runs once in a fresh worker. A function that does not load fails its calls, not the worker."""
    _leave_signals_to_the_parent()
    _die_with_the_parent(parent_pid)
    _functions[:] = [_receive(shipment) for shipment in shipments]


def answer(
    index: int, calls: list[dict[str, Any]], *, is_async: bool, read: Read, timeout_s: float
) -> list[Outcome] | Failure:
    """Makes the calls of function number `index`."""
    function = _functions[index]
    if isinstance(function, Failure):
        return [function for _ in calls]
    return run_calls(function, calls, is_async=is_async, read=read, timeout_s=timeout_s)


def _receive(shipment: Shipment) -> Callable[..., Any] | Failure:
    try:
        if shipment.pickled is None:
            return load_function(shipment.path, shipment.key)
        import cloudpickle

        return cloudpickle.loads(shipment.pickled)
    except UserError as error:
        return Failure("refused", str(error))
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure(
            "refused",
            f"{shipment.path} does not load in a worker ({reason}); set {section_of(shipment.key)}.num_workers=0",
        )


def _leave_signals_to_the_parent() -> None:
    """Ctrl-C and a cluster's SIGTERM reach the whole job, but only the trainer decides when it ends.

    Handlers that do nothing, unlike SIG_IGN, are not inherited by programs that a function starts.
    """
    os.setpgid(0, 0)  # a group of its own: killed with whatever the function started
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_the_parent(parent_pid: int) -> None:
    """Also where the parent is killed and this process is stuck in C code that never returns to Python."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)
