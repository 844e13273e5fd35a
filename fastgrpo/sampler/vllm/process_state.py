"""What an engine changes that belongs to the whole process, and how it is put back or prevented.

Random states, threads, where memory comes from, the default process group, the names of shared memory.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def kept_process_state() -> Iterator[None]:
    """Put back what vLLM changes for everyone: the random states, torch.set_num_threads, where memory may come from.

    Nor does torch's deterministic mode hold inside: vLLM sums floats in ways that the mode refuses on a GPU."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus), _own_memory_policy():
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _own_memory_policy() -> Iterator[None]:
    """vLLM's CPU worker would bind the whole process's memory to one NUMA node, the learner's too."""
    if not hasattr(torch.ops._C, "init_cpu_memory_env"):
        yield
        return
    with patch.object(torch.ops._C, "init_cpu_memory_env", lambda nodes: None):
        yield


@contextmanager
def kept_process_group() -> Iterator[None]:
    """vLLM ends by destroying the default process group, which is the learner's too; its own groups may go."""
    destroy = dist.destroy_process_group

    def destroy_subgroup(group: Any = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    with patch.object(dist, "destroy_process_group", destroy_subgroup):
        yield


@contextmanager
def shared_memory_names() -> Iterator[None]:
    """Name the files through which vLLM's CPU ranks reduce after the job: under external_launcher they would all be
    called alike, and a killed job's would fail the next."""
    try:
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    except ImportError:  # a build for GPUs
        yield
        return

    def name(communicator: Any) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        return f"{job_name()}-{communicator.unique_name.replace(':', '-')}-{ranks}"

    with patch.object(_CPUSHMDistributed, "make_group_name", staticmethod(name)):
        yield


@contextmanager
def without_warnings() -> Iterator[None]:
    """vLLM looks through its own modules and so touches names of torch that are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def job_name() -> str:
    """The same on all ranks of a job on this machine, and on no other job's."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return f"fastgrpo-{run_id}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"
    return f"fastgrpo-{os.getpid()}"
