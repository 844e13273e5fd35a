"""What ends a run early: signals, of which other ranks may hear first, and the limit of its time."""

import signal
from types import SimpleNamespace

import pytest

from fastgrpo import main
from fastgrpo.ranks import Ranks
from fastgrpo.signals import StopRequest
from fastgrpo.time_limit import TIME_IS_UP, TimeLimit


class Job(Ranks):
    """Two ranks, of which the other says what it was told to."""

    says = None

    def any_of(self, value):
        return value if value is not None else type(self).says


def run_of(ranks=None, *, step=0, num_steps=100, minutes=90.0, longest_s=None):
    train = SimpleNamespace(num_steps=num_steps, time_limit_minutes=minutes)
    return SimpleNamespace(
        step=step,
        config=SimpleNamespace(train=train),
        learner=SimpleNamespace(ranks=ranks or Ranks()),
        checkpoints=SimpleNamespace(longest_s=longest_s),
    )


def steps_within(minutes, durations, *, saves=None, set_up=0.0, num_steps=100):
    """After how many of these steps, in minutes, a limit ends a run whose saves take so long."""
    now, run = 1000.0, run_of(num_steps=num_steps)
    limit = TimeLimit(minutes, now, clock=lambda: now)
    now += 60 * set_up
    assert not limit.ends(run)
    for duration in durations:
        run.step += 1
        now += 60 * duration
        if limit.ends(run):
            return run.step
        run.checkpoints.longest_s = saves and 60 * saves
    return None


def test_no_step_is_begun_that_the_longest_so_far_would_not_have_ended_in_time():
    assert steps_within(60, [10] * 9) == 6  # 6 x 10, and the limit is not exceeded
    assert steps_within(59.9, [10] * 9) == 5
    assert steps_within(60, [10] * 9, set_up=1) == 5
    assert steps_within(59, [29, 5, 10, 5, 5, 5, 5]) == 5  # by the third, not the first, which carries the start
    assert steps_within(59, [30, 5, 5]) == 1  # as long as there is no other
    assert steps_within(60, [10] * 9, saves=1) == 5
    assert steps_within(60, [10] * 9, saves=11) == 4
    assert steps_within(None, [1e9] * 9) is None


def test_one_step_is_made_whatever_the_limit_and_the_last_ends_the_run_by_itself():
    assert steps_within(1, [10] * 9) == 1
    assert steps_within(1, [10] * 9, set_up=5) == 1
    assert steps_within(25, [10, 10, 10], num_steps=3) == 2
    assert steps_within(30, [10, 10, 10.1], num_steps=3) is None


def test_any_ranks_clock_or_signal_stops_all_and_a_signal_that_follows_is_not_its_second():
    said, job = [], Job(num_ranks=2)
    with StopRequest(said.append, TimeLimit(90, 0.0, clock=lambda: 0.0)) as stop:
        assert not stop.asked(run_of(job))
        Job.says = TIME_IS_UP
        assert stop.asked(run_of(job))
        assert said == ["train.time_limit_minutes=90: another step might not end in time; saving this one"]
        try:
            signal.raise_signal(signal.SIGTERM)  # the scheduler's, while the run saves
        except KeyboardInterrupt:
            pytest.fail("it would end the run at once")
        assert stop.code == TIME_IS_UP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_the_last_step_parts_no_rank_from_the_others():
    with StopRequest(print) as stop:
        assert not stop.asked(run_of(step=100))
        signal.raise_signal(signal.SIGTERM)
        assert stop.code is None  # the other ranks, which it has not reached yet, export the policy with this one


def test_torchrun_is_not_told_of_a_failure(monkeypatch):
    """It would take any other code for one, and start the job again where it may."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for code in (TIME_IS_UP, 143):
        monkeypatch.setattr(main, "run_hydra", lambda *_, code=code: code)
        assert main.train([]) == code
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main.train([]) == 143
    monkeypatch.setattr(main, "run_hydra", lambda *_: TIME_IS_UP)
    assert main.train([]) == 0
