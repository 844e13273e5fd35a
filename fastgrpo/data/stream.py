"""The order in which training sees its prompts: endless, reproducible, resumable."""

from __future__ import annotations

import hashlib
import random
from functools import cached_property
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.types import Prompt


class PromptStream:
    """Prompts in a fresh order every epoch.

    Epoch e's order is a permutation that depends on (seed, e) alone, or the data's own order without shuffle, and
    every prompt comes once an epoch. One `take` never holds a prompt twice while the data suffices: where it runs
    over the end of an epoch, prompts that it already holds are put back to the front of the new epoch's rest.

    Example: PromptStream(prompts, seed=0, shuffle=True).take(32)
    """

    def __init__(self, prompts: list[Prompt], *, seed: int, shuffle: bool) -> None:
        assert prompts, "no training prompts"
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._deferred: list[int] = []
        self._start_epoch(0)

    @property
    def epoch(self) -> float:
        """How often the data has been gone through, in whole and in part."""
        return self._epoch + (self._position - len(self._deferred)) / len(self._order)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, over as many epochs as that takes."""
        taken: list[int] = []
        distinct = n <= len(self._prompts)
        while len(taken) < n:
            if not self._deferred and self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
                if distinct:
                    self._take_others(taken, n)
                    break
            taken.append(self._next())
        return [self._prompts[i] for i in taken]

    def _take_others(self, taken: list[int], n: int) -> None:
        """Fills `taken` to n from a fresh epoch with prompts that it does not hold yet."""
        held = set(taken)
        skipped: list[int] = []
        while len(taken) < n:
            index = self._next()
            (skipped if index in held else taken).append(index)
        self._deferred = skipped

    def _next(self) -> int:
        if self._deferred:
            return self._deferred.pop(0)
        self._position += 1
        return self._order[self._position - 1]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._deferred = []
        self._order = list(range(len(self._prompts)))
        if self._shuffle:
            # A string seeds Python's generator through SHA-512: the same order on every machine and version.
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(self._order)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for JSON: {num_prompts, digest, epoch, position, deferred}."""
        return {
            "num_prompts": len(self._prompts),
            "digest": self._digest,
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    @cached_property
    def _digest(self) -> str:
        """Of every prompt's text in the data's order: positions mean nothing among others."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self._prompts:
            digest.update(prompt.text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises UserError where the data has other prompts now."""
        if state["num_prompts"] != len(self._prompts):
            raise UserError(
                f"resume: the checkpoint was made with {state['num_prompts']} training prompts, the data now has "
                f"{len(self._prompts)}; restore the data or start anew with resume=no"
            )
        if state.get("digest", self._digest) != self._digest:  # a checkpoint of before had none
            raise UserError(
                "resume: the data has other training prompts than the checkpoint was made with, or in another order; "
                "restore the data (generated problems follow the seed) or start anew with resume=no"
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]
        self._deferred = list(state["deferred"])
