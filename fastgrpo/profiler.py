"""What chosen steps spend their time and memory on: torch's traces and, of a GPU, snapshots of its memory.

Of each chosen step and rank, run.dir/profile/ gets

    step-000003-rank-0.json.gz    the trace, for ui.perfetto.dev or chrome://tracing
    step-000003-rank-0.txt        its costliest operators
    step-000003-rank-0.pickle     on a GPU: what was allocated when and by whom, for pytorch.org/memory_viz
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastgrpo.metrics import Ledger
from fastgrpo.ranks import Ranks

MEMORY_EVENTS = 100_000
"""The newest allocations and frees that a snapshot tells of, each with its Python stack."""
NUM_COSTLIEST = 30
ON_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
"""What a trace calls what happens where."""


class Profiler:
    """Profiles the chosen steps on the chosen ranks. Every rank of the job passes every step through it."""

    def __init__(
        self,
        directory: Path,
        steps: Collection[int],
        of_ranks: Collection[int],
        ranks: Ranks,
        ledger: Ledger,
        *,
        gpu: bool,
    ) -> None:
        """directory: where to write. ranks: this process's place in the job. ledger: its parts are the trace's ranges.
        gpu: whether a GPU computes."""
        self._directory, self._steps, self._of_ranks = directory, frozenset(steps), frozenset(of_ranks)
        self._ranks, self._ledger, self._gpu = ranks, ledger, gpu
        self._done: set[int] = set()
        if steps and not gpu:  # where Kineto has no errors to tell, only each beginning and end, at its highest level
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Take the block for the step. What a profile costs before and after it is no step's time."""
        if step not in self._steps:
            yield
            return
        with self._recorded(step) if self._ranks.rank in self._of_ranks else nullcontext():
            self._ranks.barrier()
            self._ledger.step()
            # Tools that read traces know a step by this name.
            with record_function(f"ProfilerStep#{step}"), self._ledger.marking(record_function):
                yield
        self._ranks.barrier()
        self._ledger.step()
        self._done.add(step)

    def missed(self) -> list[int]:
        """The chosen steps of which there is no trace, from this run or one that it goes on with."""
        rank = min(self._of_ranks, default=0)
        return sorted(s for s in self._steps - self._done if not _file(self._directory, s, rank, "json.gz").exists())

    @contextmanager
    def _recorded(self, step: int) -> Iterator[None]:
        json_file, zipped, text, snapshot = (
            _file(self._directory, step, self._ranks.rank, kind) for kind in ("json", "json.gz", "txt", "pickle")
        )
        self._directory.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        with _memory_recorded(snapshot) if self._gpu else nullcontext(), profile(activities=activities) as trace:
            yield
        trace.export_chrome_trace(str(json_file))
        with open(json_file, "rb") as plain, gzip.open(zipped, "wb", compresslevel=6) as file:
            shutil.copyfileobj(plain, file)
        with open(json_file, encoding="utf-8", errors="replace") as plain:
            text.write_text(costliest(json.load(plain)["traceEvents"]))
        json_file.unlink()


def costliest(events: Iterable[dict[str, Any]]) -> str:
    """A table of where a trace's time went: the host's by self time, which is no inner operator's or range's, and the
    GPU's by kernel."""
    timed = [event for event in events if event.get("ph") == "X"]  # those that last
    host = [event for event in timed if event.get("cat") in ON_HOST]
    gpu = [event for event in timed if event.get("cat") in ON_GPU]
    total = sum(event["dur"] for event in host if event["name"].startswith("ProfilerStep#"))
    tables = [_table("host, self time", _self_times(host), Counter(e["name"] for e in host), total)]
    if gpu:
        spent: Counter[str] = Counter()
        for event in gpu:
            spent[event["name"]] += event["dur"]
        tables.append(_table("GPU", spent, Counter(e["name"] for e in gpu), total))
    return "\n".join(tables)


def _self_times(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Microseconds by name. Within a thread events nest."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    spent: Counter[str] = Counter()
    for thread in threads.values():
        outer: list[dict[str, Any]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while outer and outer[-1]["ts"] + outer[-1]["dur"] <= event["ts"]:
                outer.pop()
            if outer:
                spent[outer[-1]["name"]] -= event["dur"]
            spent[event["name"]] += event["dur"]
            outer.append(event)
    return spent


def _table(title: str, spent: Counter[str], calls: Counter[str], total: float) -> str:
    lines = [f"{title:<80}{'ms':>10}{'%':>7}{'calls':>9}"]
    for name, microseconds in spent.most_common(NUM_COSTLIEST):
        lines.append(f"{name[:78]:<80}{microseconds / 1e3:>10.2f}{100 * microseconds / total:>7.1f}{calls[name]:>9}")
    return "\n".join([*lines, ""])


@contextmanager
def _memory_recorded(path: Path) -> Iterator[None]:
    """Write down what the block does to the GPU's memory, also where there was too little of it: then above all."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS, clear_history=True)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def _file(directory: Path, step: int, rank: int, kind: str) -> Path:
    return directory / f"step-{step:06d}-rank-{rank}.{kind}"
