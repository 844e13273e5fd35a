"""The ledger adds up exactly; the files of a resumed run are those of one that was never stopped."""

import json
import math
import sys
from contextlib import contextmanager

import pytest

from fastgrpo.config import UserError
from fastgrpo.metrics import Ledger, MetricsLog, Sample, read_jsonl
from fastgrpo.trackers import TRACKERS, check_trackers


class FakeClock:
    """Nanoseconds that pass only when told to."""

    def __init__(self):
        self.now = 5_000_000_000

    def __call__(self):
        return self.now

    def passes(self, nanoseconds):
        self.now += nanoseconds


def make_log(run_dir, resume_step=None, trackers=(), **kwargs):
    return MetricsLog(run_dir, trackers, resume_step=resume_step, run_name="test", config={"seed": 0}, **kwargs)


def make_sample(step, **changes):
    fields = {
        "step": step,
        "kind": "train",
        "prompt_id": "train/1",
        "prompt": "1+1=",
        "completion": "2",
        "answer": "2",
        "reward": 1.0,
        "advantage": 0.5,
    }
    return Sample(**{**fields, **changes})


def test_ledger_charges_each_part_its_own_time():
    clock = FakeClock()
    ledger = Ledger(clock=clock)
    clock.passes(100_000_000)
    with ledger("generate"):
        clock.passes(2_000_000_000)
    with ledger("update"):
        clock.passes(300_000_000)
        with ledger("logprobs"):
            clock.passes(70_000_000)
        clock.passes(5_000_000)
    assert ledger.step() == {
        "time/generate_s": 2.0,
        "time/reward_s": 0.0,
        "time/logprobs_s": 0.07,
        "time/update_s": 0.305,
        "time/share_s": 0.0,
        "time/checkpoint_s": 0.0,
        "time/environment_s": 0.0,
        "time/eval_s": 0.0,
        "time/other_s": 0.1,
        "time/total_s": 2.475,
    }


def test_ledger_counts_time_between_steps_and_across_a_step_inside_a_part():
    clock = FakeClock()
    ledger = Ledger(clock=clock)
    ledger.step()
    clock.passes(40)
    with ledger("eval"):
        clock.passes(7)
        first = ledger.step()
        clock.passes(11)
    second = ledger.step()
    assert (first["time/other_s"], first["time/eval_s"], first["time/total_s"]) == (40e-9, 7e-9, 47e-9)
    assert (second["time/eval_s"], second["time/total_s"]) == (11e-9, 11e-9)


def test_ledger_parts_add_up_exactly_on_the_real_clock():
    ledger = Ledger()
    for part in ("generate", "reward", "update"):
        with ledger(part), ledger("share"):
            math.factorial(2000)
    row = ledger.step()
    nanoseconds = {key: round(seconds * 1e9) for key, seconds in row.items()}
    assert sum(ns for key, ns in nanoseconds.items() if key != "time/total_s") == nanoseconds["time/total_s"] > 0


def test_ledger_closes_a_part_that_raises():
    ledger = Ledger(clock=FakeClock())

    def fail():
        assert ledger.part == "update"
        raise RuntimeError

    with pytest.raises(RuntimeError), ledger("update"):
        fail()
    assert ledger.part == "other"


def test_ledger_synchronizes_before_each_border():
    clock = FakeClock()
    ledger = Ledger(clock=clock, synchronize=lambda: clock.passes(1_000))
    with ledger("generate"):
        pass
    row = ledger.step()
    # Work that was queued before the block is not the block's.
    assert (row["time/other_s"], row["time/generate_s"]) == (2_000e-9, 1_000e-9)


def test_parts_are_marked_only_meanwhile_and_with_what_they_are_part_of():
    ledger, marks = Ledger(clock=FakeClock()), []

    @contextmanager
    def mark(name):
        marks.append(f"{name}[")
        yield
        marks.append("]")

    def evaluate():
        with ledger("eval"), ledger.all_as("eval"), ledger("generate"):
            pass

    with ledger.marking(mark):
        with ledger("update"), ledger("logprobs"):
            pass
        evaluate()
    evaluate()
    assert marks == ["update[", "logprobs[", "]", "]", "eval[", "eval/generate[", "]", "]"]


def test_ledger_refuses_an_unknown_part():
    with pytest.raises(ValueError, match="'sampling' is none of generate, environment, reward"), Ledger()("sampling"):
        pass


def test_rows_are_valid_json_whatever_the_values(tmp_path):
    with make_log(tmp_path) as log:
        log.write({"step": 1, "loss": math.nan, "kl": math.inf, "reward/mean": 0.1, "tokens": 512})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "kl": null, "reward/mean": 0.1, "tokens": 512}\n'


def test_rows_accept_tensors_and_refuse_text(tmp_path):
    torch = pytest.importorskip("torch")
    with make_log(tmp_path) as log:
        log.write({"step": torch.tensor(3), "loss": torch.tensor(0.5)})
        with pytest.raises(ValueError, match="a metric must be a number, got 'high'"):
            log.write({"step": 4, "loss": "high"})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    log = make_log(tmp_path)
    log.write({"step": 1, "loss": 0.5})
    log.write_samples([make_sample(1)])
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == len(read_jsonl(tmp_path / "samples.jsonl")) == 1


def test_samples_hold_any_text_and_any_answer(tmp_path):
    with make_log(tmp_path) as log:
        log.write_samples([make_sample(1, completion="a\n\u2028\x00\udc80é", answer=math.nan, reward=math.nan)])
    (record,) = read_jsonl(tmp_path / "samples.jsonl")
    assert (record["completion"], record["answer"], record["reward"]) == ("a\n\u2028\x00\udc80é", "nan", None)


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, monkeypatch):
    def train(log, steps):
        for step in steps:
            log.write({"step": step, "loss": 1 / (step + 3)})
            log.write_samples([make_sample(step)])

    with make_log(tmp_path / "whole") as log:
        train(log, range(6))
    with make_log(tmp_path / "stopped") as log:
        train(log, range(5))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "stopped" / name, "ab") as file:
            file.write(b'{"step": 2, "los')  # what kill -9 leaves
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(loads(line)["step"]) or loads(line))
    with make_log(tmp_path / "stopped", resume_step=2) as log:
        assert parsed == [4, 3, 2] * 2  # the ends of two files that a long run makes large
        train(log, range(3, 6))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_resuming_from_nothing_keeps_nothing(tmp_path):
    with make_log(tmp_path) as log:
        log.write({"step": 0, "eval/accuracy": 0.25})
    make_log(tmp_path, resume_step=-1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    with make_log(tmp_path) as log:
        log.write({"step": 0, "eval/accuracy": 0.25})
    with pytest.raises(UserError, match=r"holds a run already: set resume=auto or another run.dir"):
        make_log(tmp_path)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_reading_leaves_out_what_is_broken(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[1]\n\n{"step": "\xff"}\n{"step": 2}\r\n{"step": 3}\n{"step": 4, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_unknown_and_missing_trackers_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"run.trackers=tensorbord: choose any of tensorboard, wandb, mlflow"):
        check_trackers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install fastgrpo\[wandb\]"):
        check_trackers(["wandb"])


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_log(tmp_path, trackers=["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "reward/mean": step / 4, "loss": math.nan})
    with make_log(tmp_path, trackers=["tensorboard"], resume_step=1) as log:
        log.write({"step": 2, "reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert events.Tags()["scalars"] == ["reward/mean"]


def test_a_failing_tracker_does_not_end_the_run(tmp_path, monkeypatch):
    class Away:
        def __init__(self, *_):
            pass

        def log(self, step, row):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", Away)
    monkeypatch.setitem(TRACKERS, "wandb", Away)
    notices = []
    with make_log(tmp_path, trackers=["wandb"], notify=notices.append) as log:
        log.write({"step": 1})
        log.write({"step": 2})
    assert notices == ["wandb failed and gets no more metrics of this run: no route to host"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 2}
    monkeypatch.setattr(Away, "__init__", lambda self, *_: self.log(0, {}))
    line = r"run.trackers=wandb: cannot begin \(ConnectionError: no route to host\); mend that, or leave it out"
    with pytest.raises(UserError, match=line):
        make_log(tmp_path, trackers=["wandb"], resume_step=2)
