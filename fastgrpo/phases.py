"""Whose turn it is to hold the memory: the sampler's while it draws, the learner's while it learns.

    ROLLOUT  KV cache awake; the optimizer's state and the gradients on the host where the plan says so
    TRAIN    KV cache asleep; optimizer state and gradients back
    SHARE    the policy moves to the sampler, which needs its weights awake

One object owns the turns, and notes what the process holds before and after each change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from fastgrpo.learner.protocol import Learner
from fastgrpo.sampler.protocol import Sampler

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
Phase = Literal["rollout", "train", "share"]


class Phases:
    """Changes between the phases, each at most once until another has been entered.

    The sampler begins awake. offload: whether the learner's optimizer state and gradients leave the device while the
    sampler has it. planned: bytes that a phase is expected to hold, noted beside the measured ones. measure: bytes that
    this process holds of the device.
    """

    def __init__(
        self,
        learner: Learner,
        sampler: Sampler | None,
        *,
        offload: bool,
        planned: Mapping[Phase, int] | None = None,
        measure: Callable[[], int] | None = None,
    ) -> None:
        self._learner, self._sampler, self._offload = learner, sampler, offload
        self._planned, self._measure = planned or {}, measure or held_bytes
        self.current: Phase | None = None
        self._row: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        """Hand the memory over, where the phase is a new one."""
        if phase == self.current:
            return
        before = self._measure()
        if self.current is not None:  # what the phase that ends has come to hold
            self._row[f"memory/{self.current}_end_bytes"] = before
        if phase == "train":
            self._to_learner()
        elif self.current in (None, "train"):
            self._to_sampler(asleep=self.current == "train")
        self.current = phase
        self._row[f"memory/{phase}_begin_bytes"] = self._measure()
        if phase in self._planned:
            self._row[f"memory/{phase}_planned_bytes"] = self._planned[phase]

    def row(self) -> dict[str, float]:
        """The newest bytes of every phase, for a step's metrics."""
        return dict(self._row)

    def _to_learner(self) -> None:
        if self._sampler is not None:
            self._sampler.sleep()
        if self._offload:
            self._learner.onload()

    def _to_sampler(self, *, asleep: bool) -> None:
        if self._offload:
            self._learner.offload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the sampler's allocations come from another pool
        if self._sampler is not None and asleep:
            self._sampler.wake()


def held_bytes() -> int:
    """What is in use of the GPU, by whomever, or without one this process's resident memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE_BYTES
