"""What dist_checkpointing writes, written by whichever thread asks for it.

Megatron 0.16 forks processes for that: from a process full of threads, and they would go on writing after a killed run.
Threads do as well, because writing and hashing let others run. Nor is there a process that holds the results until they
are asked for: a SIGTERM of torchrun's goes to a rank's children too, and the save that follows would not find it.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from fastgrpo.learner.host_memory import HostMemory
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.protocol import PendingSave

# From 0.17 on another package's writer is the default.
OWN = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
# Megatron turns garbage collection off around it; in a thread that would turn it off for the training loop too.
write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)
filesystem_async._results_queue = SimpleQueue()


def begin_save(state: dict[str, Any], directory: Path, host: HostMemory) -> PendingSave:
    """Plan what each rank writes, and copy this rank's part of it to the host. Collective over all ranks."""
    with megatron_on_cpu():
        request = dist_checkpointing.save(state, str(directory), async_sharded_save=True, **OWN)
    if request.async_fn is None:  # other ranks write all that this one holds
        return PendingSave(files={}, finish=partial(_finish, request, {}))
    buckets = host.copy_of(request.async_fn_args[1])  # a file each: its path, its name and what it holds
    results: dict[int, list[Any]] = {}
    files = {Path(bucket[0]): partial(_write, request, i, bucket, results) for i, bucket in enumerate(buckets)}
    return PendingSave(files=files, finish=partial(_finish, request, results))


def _write(request: AsyncRequest, index: int, bucket: tuple[Any, ...], results: dict[int, list[Any]]) -> None:
    """Write a file and note where in it everything is."""
    transforms, _ = request.async_fn.args
    answers: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    turns: Queue[int] = Queue()
    turns.put(index)
    write_file(transforms, index, bucket, answers, turns, use_fsync=False)
    _, found = answers.get()
    if isinstance(found, Exception):
        raise found
    results[index] = found


def _finish(request: AsyncRequest, results: dict[int, list[Any]]) -> None:
    """Let the main rank write the index of all ranks' files. Collective over all ranks."""
    if results:
        request.async_fn_args[2].put(results)
    with megatron_on_cpu():
        for finalize in request.finalize_fns:
            finalize()
