"""Profiles of chosen steps: the run is the same, the trace shows the ledger's parts, and its cost is no step's time."""

import gzip
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from builders import small_run
from runs import rows_of, without_clock
from test_metrics import FakeClock

from fastgrpo import profiler as module
from fastgrpo.metrics import Ledger
from fastgrpo.profiler import MEMORY_EVENTS, Profiler, costliest
from fastgrpo.ranks import Ranks


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_profiled_step_is_the_same_step_and_its_trace_shows_the_ledgers_parts(workplace, tiny_qwen2):
    plain = rows_of(*small_run(tiny_qwen2, "run.dir=plain"))
    profiled = rows_of(*small_run(tiny_qwen2, "run.profile_steps=[2]"))
    assert without_clock(profiled) == without_clock(plain)
    assert Path("run/samples.jsonl").read_bytes() == Path("plain/samples.jsonl").read_bytes()
    assert not Path("plain/profile").exists()
    assert names_in(Path("run/profile")) == ["step-000002-rank-0.json.gz", "step-000002-rank-0.txt"]
    events = json.loads(gzip.decompress(Path("run/profile/step-000002-rank-0.json.gz").read_bytes()))["traceEvents"]
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    parts = {"generate", "reward", "logprobs", "update", "share", "checkpoint", "eval", "eval/generate", "eval/reward"}
    assert ranges.keys() >= {"ProfilerStep#2", *parts}
    for part in parts:
        assert within(ranges[part], ranges["ProfilerStep#2"])
        assert not part.startswith("eval/") or within(ranges[part], ranges["eval"])
    for part in ("generate", "logprobs", "update", "eval/generate"):
        operators = [event["name"] for event in events if event.get("cat") == "cpu_op" and within(event, ranges[part])]
        assert any("linear" in name or "mm" in name for name in operators), part
        assert any("Backward" in name for name in operators) == (part == "update")
    lines = Path("run/profile/step-000002-rank-0.txt").read_text().splitlines()
    assert lines[0].split() == ["host,", "self", "time", "ms", "%", "calls"]
    assert len(lines) == 31


def within(inner: dict, outer: dict) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def event(category: str, name: str, begin: float, duration: float, thread: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": begin, "dur": duration}


def test_time_is_told_once_to_the_innermost():
    trace = [
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1},
        event("cpu_op", "aten::mm", 600, 200),
        event("user_annotation", "ProfilerStep#3", 0, 2000),
        event("user_annotation", "update", 500, 1000),
        event("cpu_op", "aten::linear", 500, 400),
        event("cuda_runtime", "cudaLaunchKernel", 650, 50),
        event("cpu_op", "aten::linear", 900, 100),  # begins as the other ends
        event("cpu_op", "aten::linear", 600, 300, thread=2),
        event("kernel", "gemm", 700, 900),
        event("gpu_user_annotation", "ProfilerStep#3", 700, 900),
        event("gpu_memcpy", "Memcpy DtoH", 1700, 100),
    ]
    host, gpu = costliest(trace).split("\nGPU")
    assert [line.split() for line in host.splitlines()[1:]] == [
        ["ProfilerStep#3", "1.00", "50.0", "1"],
        ["aten::linear", "0.60", "30.0", "3"],
        ["update", "0.50", "25.0", "1"],
        ["aten::mm", "0.15", "7.5", "1"],
        ["cudaLaunchKernel", "0.05", "2.5", "1"],
    ]
    assert [line.split() for line in gpu.splitlines()[1:]] == [
        ["gemm", "0.90", "45.0", "1"],
        ["Memcpy", "DtoH", "0.10", "5.0", "1"],
    ]


def test_what_a_profile_costs_is_no_steps_time(tmp_path, monkeypatch):
    clock = FakeClock()
    ledger = Ledger(clock=clock)
    profiler = Profiler(tmp_path, [1], [0], Ranks(), ledger, gpu=False)
    monkeypatch.setattr(module, "profile", lambda **key: clock.passes(7_000_000) or torch.profiler.profile(**key))
    monkeypatch.setattr(module, "costliest", lambda events: str(clock.passes(9_000_000)))
    with profiler.step(1):
        clock.passes(1_000)
        assert ledger.step()["time/total_s"] == 1_000e-9
    clock.passes(2_000)
    with profiler.step(2):
        assert ledger.step()["time/total_s"] == 2_000e-9
    assert names_in(tmp_path) == ["step-000001-rank-0.json.gz", "step-000001-rank-0.txt"]


@pytest.fixture
def told(monkeypatch):
    """What torch is told of a GPU's memory, under the signatures that it has."""
    calls = []

    def replace(name, effect):
        signature = inspect.signature(getattr(torch.cuda.memory, name))

        def noting(*args, **key):
            calls.append((name, signature.bind(*args, **key).arguments))
            effect(*args)

        monkeypatch.setattr(torch.cuda.memory, name, noting)

    replace("_record_memory_history", lambda *_: None)
    replace("_dump_snapshot", lambda path: Path(path).write_bytes(pickle.dumps({"segments": []})))
    return calls


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("fails", [False, True])
def test_a_gpus_memory_is_written_down_also_where_it_ran_out(fails, told, tmp_path):
    profiler = Profiler(tmp_path / "profile", [3], [0], Ranks(), Ledger(), gpu=True)
    with profiler.step(2):
        assert told == []
    try:
        with profiler.step(3):
            ((_, begin),) = told
            if fails:
                raise torch.OutOfMemoryError
    except torch.OutOfMemoryError:
        assert fails
    assert begin == {"stacks": "python", "max_entries": MEMORY_EVENTS, "clear_history": True}
    stem = str(tmp_path / "profile/step-000003-rank-0")
    assert told[1:] == [
        ("_dump_snapshot", {"filename": f"{stem}.pickle"}),
        ("_record_memory_history", {"enabled": None}),
    ]
    whole = ["step-000003-rank-0.json.gz", "step-000003-rank-0.pickle", "step-000003-rank-0.txt"]
    assert names_in(tmp_path / "profile") == (whole[1:2] if fails else whole)
    assert profiler.missed() == ([3] if fails else [])


def test_a_rank_that_is_not_chosen_writes_nothing_and_knows_what_was_missed(tmp_path):
    first, second = (Profiler(tmp_path, [1, 2, 9], [1], Ranks(rank=rank), Ledger(), gpu=False) for rank in (0, 1))
    with first.step(2):
        pass
    assert list(tmp_path.iterdir()) == []
    assert first.missed() == [1, 9]
    with second.step(1):
        pass
    assert names_in(tmp_path) == ["step-000001-rank-1.json.gz", "step-000001-rank-1.txt"]
    assert first.missed() == [9]
