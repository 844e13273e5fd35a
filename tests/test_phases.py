"""Who holds the memory when, and what is noted of it."""

import torch

from fastgrpo.phases import Phases, held_bytes


class Recorder:
    """A learner and a sampler that write down what they are told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda: self.told.append(name)


def phases_of(offload, sampler=True):
    recorder, sizes = Recorder(), iter(range(100, 200))
    return recorder, Phases(recorder, recorder if sampler else None, offload=offload, measure=lambda: next(sizes))


def test_the_memory_changes_hands_once_a_turn():
    recorder, phases = phases_of(offload=True)
    for phase in ("share", "rollout", "rollout", "train", "train", "share", "rollout"):
        phases.enter(phase)
    # asleep before the learner takes its own back, and gone before the sampler wakes
    assert recorder.told == ["offload", "sleep", "onload", "offload", "wake"]
    assert phases.current == "rollout"


def test_nothing_is_offloaded_that_fits():
    recorder, phases = phases_of(offload=False)
    for phase in ("rollout", "train", "share"):
        phases.enter(phase)
    assert recorder.told == ["sleep", "wake"]


def test_a_rank_that_does_not_sample_offloads_all_the_same():
    recorder, phases = phases_of(offload=True, sampler=False)
    phases.enter("rollout")
    phases.enter("train")
    assert recorder.told == ["offload", "onload"]


def test_bytes_before_and_after_every_change():
    _, phases = phases_of(offload=False)
    phases.enter("rollout")
    assert phases.row() == {"memory/rollout_begin_bytes": 101}
    phases.enter("train")
    phases.enter("share")
    assert phases.row() == {
        "memory/rollout_begin_bytes": 101,
        "memory/rollout_end_bytes": 102,
        "memory/train_begin_bytes": 103,
        "memory/train_end_bytes": 104,
        "memory/share_begin_bytes": 105,
    }


def test_what_was_planned_stands_beside_what_is_held():
    phases = Phases(Recorder(), None, offload=False, planned={"train": 7}, measure=lambda: 8)
    phases.enter("rollout")
    phases.enter("train")
    row = phases.row()
    assert (row["memory/train_begin_bytes"], row["memory/train_planned_bytes"]) == (8, 7)
    assert "memory/rollout_planned_bytes" not in row


def test_the_process_is_weighed():
    before = held_bytes()
    block = torch.ones(1 << 24)
    assert held_bytes() - before > 0.9 * block.nbytes
