"""fastgrpo in processes of its own that a test kills, signals and starves at a moment of its choice.

A server imports everything once and forks a process for each run, which so starts in no time. What happens in it is
installed by a picklable function of this module before `main` is called.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fastgrpo.assemble", "fastgrpo.report", "hydra"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal that killed it) and what it had printed."""

    code: int
    out: str
    err: str


def fastgrpo(*arguments: str, install: Callable[[], None] | None = None, timeout: float = 120) -> Ended:
    """Run the command in the current directory, in a process group of its own."""
    out, err = Path("stdout"), Path("stderr")
    process = FORKSERVER.Process(target=_run, args=(arguments, os.getcwd(), install))
    process.start()
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"still running after {timeout} s: {arguments}")
    return Ended(process.exitcode, out.read_text(), err.read_text())


def _run(arguments: tuple[str, ...], directory: str, install: Callable[[], None] | None) -> None:
    os.setsid()
    os.chdir(directory)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.argv = ["fastgrpo", *arguments]
    if install is not None:
        install()
    from fastgrpo.main import main

    main()


def signal_at(place: str, call: int, signum: int) -> None:
    """Send this process the signal when `module:function` is called for the call-th time, before it does anything."""
    before(place, call, lambda: os.kill(os.getpid(), signum))


def interrupt_twice(place: str) -> None:
    """Ctrl-C, and again, when the function is called."""
    for _ in range(2):
        signal_at(place, 1, signal.SIGINT)


def kill_in_the_middle_of_saving(call: int) -> None:
    """Die with half of a checkpoint's largest file on the disk."""
    import torch

    save, count = torch.save, 0

    def half(value: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if count < call:
            return save(value, path)
        buffer = io.BytesIO()
        save(value, buffer)
        Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def fill_the_disk_at(place: str, call: int, num_bytes: int) -> None:
    """From that call on no file grows beyond num_bytes, which fails as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before(place, call, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)))


def hold_saving(call: int, place: str, until: int) -> None:
    """The call-th torch.save begins when `module:function` is called for the until-th time."""
    begun = threading.Event()
    before(place, until, begun.set)
    before("torch:save", call, begun.wait)


def an_hour_passes_at(place: str, calls: int) -> None:
    """By the time limit's clock, at each of the function's first calls."""
    from fastgrpo import time_limit

    passed, monotonic = 0.0, time_limit.time.monotonic

    def pass_an_hour() -> None:
        nonlocal passed
        passed += 3600

    time_limit.time = SimpleNamespace(monotonic=lambda: monotonic() + passed)
    for call in range(1, calls + 1):
        before(place, call, pass_an_hour)


def fail_at(place: str, call: int) -> None:
    """Raise what the user can mend when `module:function` is called for the call-th time."""
    from fastgrpo.config import UserError

    def fail() -> None:
        raise UserError("a failure")

    before(place, call, fail)


def both(*installs: Callable[[], None]) -> None:
    for install in installs:
        install()


def before(place: str, call: int, do: Callable[[], object]) -> None:
    """Have something done at the start of a function's call-th call."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, count = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            do()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
