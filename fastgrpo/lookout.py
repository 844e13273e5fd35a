"""A process that fails ends those of all nodes, with its own line.

torchrun ends the processes of its node alone. Those of other nodes would wait for the failed one, for half an hour over
NCCL or before all have met, and then end in a traceback that does not say why. So the first that fails leaves a line in
torchrun's store, where all the others look for one.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fastgrpo.config import UserError
from fastgrpo.network import torchrun_store
from fastgrpo.nodes import JobError, first_of_node, has_store, whoami

LINE = "failure"
_blocks = itertools.count()  # a sweep goes on after a run that fails, and so each has a line of its own
LOOK_EVERY_S = 1.0
LINGER_S = 2.5
"""What a failed process stays for: torchrun's store may end with it, and in this time all look into it."""
PATIENCE_S = 6.0
"""What the others have to find the same mistake and to say it themselves."""


@contextmanager
def failing_together() -> Iterator[None]:
    """Over several nodes: leave a line where the block fails, and end this process with that of another that does.

    Raises JobError where an exchange breaks off because another process has failed, and UserError where it breaks
    off and nobody says why.
    """
    if not has_store():
        yield
        return
    key = f"{LINE}/{next(_blocks)}"
    lookout = Lookout(key)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        failure = _explained(error, lookout)
        if not isinstance(failure, JobError) and not lookout.is_blind:
            _leave(key, f"{whoami()}: {_in_one_line(failure)}")
        if failure is error:
            raise
        raise failure from error
    finally:
        lookout.close()


class Lookout:
    """A thread that looks for another process's line, and on one process of a node ends that with it."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.line: str | None = None
        self.is_blind = False
        """Whether torchrun's store has ended with its node, or cannot be reached, as network.join then says."""
        self._found, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)
        self._thread.start()

    def wait_for_line(self, seconds: float) -> str | None:
        """What another process has left, or leaves within this time."""
        self._found.wait(seconds)
        return self.line

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * LOOK_EVERY_S)

    def _look(self) -> None:
        try:
            store = torchrun_store()
            while not self._closed.wait(LOOK_EVERY_S):
                if store.check([self._key]):
                    self.line = store.get(self._key).decode()
                    self._found.set()
                    break
        except RuntimeError:
            self.is_blind = True
        if self.line is None or not first_of_node() or self._closed.wait(PATIENCE_S):
            return
        os.write(sys.stderr.fileno(), f"fastgrpo: {self.line}\n".encode())
        os._exit(2)  # the main thread may be waiting inside of NCCL; torchrun ends the node's other processes


def _leave(key: str, line: str) -> None:
    """Tell the other processes, unless one of them has failed before."""
    with suppress(RuntimeError):
        torchrun_store(LINGER_S).compare_set(key, "", line)
        time.sleep(LINGER_S)


def _explained(error: BaseException, lookout: Lookout) -> BaseException:
    """The error; in place of what torch says of an exchange that broke off, the cause."""
    broken = error if _is_broken_exchange(error) else error.__cause__  # which a checkpoint's may have been
    if not _is_broken_exchange(broken):
        return error
    line = lookout.wait_for_line(LINGER_S)
    if line is not None:
        return JobError(line)
    said = re.sub(r"\[[^]]*/gloo/[^]]*\] *", "", _first_line(broken)).partition(". ")[0]
    return UserError(
        f"an exchange with another process broke off ({said}): it was killed, or its node is gone; look for what it "
        "says, then go on with resume=auto"
    )


def _is_broken_exchange(error: BaseException | None) -> bool:
    if isinstance(error, UserError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    return f"{type(error).__name__}: {_first_line(error)}; its output says where"


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).splitlines()), "")
