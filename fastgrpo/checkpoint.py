"""Checkpoints that are whole or absent: written beside, verified, then renamed.

A checkpoint is a directory checkpoints/step-000050 with learner/ (what the learner writes: weights, optimizer,
reference), run.json (the step, the data's order, unfinished completions) and manifest.json (every file's size and
SHA-256). A kill at any moment leaves at worst a directory whose name starts with a dot, which the next save removes
(fastgrpo/step_directories.py).

Each rank writes, flushes and hashes its own files, and on a resume hashes its share of all of them. Directories are
made, named and removed by the main rank alone.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastgrpo.config import UserError
from fastgrpo.learner.protocol import PendingSave
from fastgrpo.manifest import Fingerprint, find_problem, seal, write_file
from fastgrpo.ranks import Ranks
from fastgrpo.step_directories import StepDirectories

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint. Example: Checkpoint(path=Path("runs/a/checkpoints/step-000050"))."""

    path: Path
    """Not always named for its step: it may be somebody's copy."""

    @property
    def step(self) -> int:
        """The step that it was saved after."""
        return json.loads((self.path / "manifest.json").read_text())["step"]

    @property
    def learner(self) -> Path:
        """The directory that the learner wrote."""
        return self.path / "learner"

    def run_state(self) -> dict[str, Any]:
        """What the learner does not hold: the step, the data's order, unfinished completions."""
        return json.loads((self.path / "run.json").read_text())


class BeginSave(Protocol):
    """Learner.begin_save."""

    def __call__(self, directory: Path, *, copy: bool) -> PendingSave: ...


class Checkpoints:
    """The checkpoints of one run directory, the newest `keep` of them. Every rank of the job calls every method.

    ranks: the job's, each of them a data rank (ranks.join_job).
    """

    def __init__(self, run_dir: Path, *, keep: int, ranks: Ranks | None = None) -> None:
        self.directory, self.keep, self.ranks = run_dir / "checkpoints", keep, ranks or Ranks()
        self._steps = StepDirectories(self.directory)
        self._pending: _Pending | None = None
        self.longest_s: float | None = None
        """What the slowest save so far took here until its last file was written; None before the first."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let no thread outlive the run, unless a second Ctrl-C wants it to end at once."""
        if self._pending is not None and kind is not KeyboardInterrupt:
            wait(self._pending.files.values())

    def save(self, step: int, begin_save: BeginSave, run: dict[str, Any], *, background: bool = False) -> None:
        """Write a checkpoint beside the others; `publish` makes it count.

        In the background, what this waits for is the learner's copy of its state, and for a save before this one.

        Raises UserError where the disk is full or the directory cannot be written; older checkpoints stay as they are.
        """
        began, self.longest_s = time.monotonic(), self.longest_s or 0.0
        self.publish(waits=True)
        partial = self._steps.partial(step)
        with self._failing_in_one_line(step, partial):
            if self.ranks.is_main:
                self._steps.begin(step)
                (partial / "learner").mkdir()
                (partial / "run.json").write_text(json.dumps({"step": step, **run}))
            self.ranks.barrier()
            save = begin_save(partial / "learner", copy=background)
        files = {
            str(path.relative_to(partial)): _in_thread(functools.partial(write_file, path, write))
            for path, write in save.files.items()
        }
        for file in files.values():
            file.add_done_callback(lambda _: self._took(time.monotonic() - began))
        self._pending = _Pending(step=step, path=partial, files=files, finish=save.finish)
        if not background:
            wait(files.values())

    def publish(self, *, waits: bool = False) -> None:
        """Give what was saved its name, where every rank has written its files, and remove those beyond `keep`.

        Where one is still writing nothing happens, or with `waits` it is waited for. Raises UserError on all ranks
        where one could not write.
        """
        pending = self._pending
        if pending is None:
            return
        if waits:
            wait(pending.files.values())
        parts = self.ranks.everyone(pending.outcome(self.ranks))
        problem = next((part for part in parts if isinstance(part, str)), None)
        whole = [part for part in parts if isinstance(part, dict)]
        if problem is None and len(whole) < len(parts):
            return
        self._pending = None
        with self._failing_in_one_line(pending.step, pending.path):
            if problem is not None:
                raise OSError(problem)
            pending.finish()
            if self.ranks.is_main:
                seal(pending.path, pending.step, {name: found for part in whole for name, found in part.items()})
                self._name(pending.path)

    def newest(self, notify: Callable[[str], object]) -> Checkpoint | None:
        """The newest whole checkpoint, None where there is none yet; `notify` hears of each broken one that is skipped.

        Raises UserError where all are broken: to begin anew would delete what might still be mended.
        """
        every = self.ranks.from_main(self._steps.newest_first())
        for path in every:
            problem = find_problem(path, self.ranks)
            if problem is None:
                return Checkpoint(path=path)
            notify(f"checkpoint {path} is broken ({problem}); skipped")
        if every:
            raise UserError(
                f"resume: no checkpoint in {self.directory} is whole; restore one, or begin anew in another run.dir"
            )
        return None

    def remove_after(self, step: int) -> None:
        """Forget the future of a run that goes on from an older step, as its metrics do."""
        if self.ranks.is_main:
            self._steps.remove_after(step)

    def _took(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s or 0.0, seconds)

    def _name(self, partial: Path) -> None:
        self._steps.name(partial)
        for old in self._steps.newest_first()[self.keep :]:
            shutil.rmtree(old)

    @contextmanager
    def _failing_in_one_line(self, step: int, partial: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            if self.ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"checkpoint of step {step} cannot be written to {self.directory}: {error}; "
                "free space or choose another run.dir, then go on with resume=auto"
            ) from error


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint whose files, by their names in it, this rank's threads write."""

    step: int
    path: Path
    files: dict[str, Future[Fingerprint]]
    finish: Callable[[], None]

    def outcome(self, ranks: Ranks) -> dict[str, Fingerprint] | str | None:
        """What this rank has written, or why it could not, in words, or None: it still writes."""
        if not all(file.done() for file in self.files.values()):
            return None
        try:
            return {name: file.result() for name, file in self.files.items()}
        except (OSError, RuntimeError) as error:
            return f"rank {ranks.rank}: {error}" if ranks.num_ranks > 1 else str(error)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """What the work returns or raises, in time; its thread does not keep an interrupted process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def open_checkpoint(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint at exactly this path, on all ranks. Raises UserError where it is none or is broken."""
    problem = find_problem(path, ranks)
    if problem is not None:
        raise UserError(f"resume={path}: {problem}; give a run's directory to take its newest whole checkpoint")
    return Checkpoint(path=path)
