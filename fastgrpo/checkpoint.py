"""Checkpoints that are whole or absent: written beside, verified, then renamed.

A checkpoint is a directory checkpoints/step-000050 with learner/ (what the learner writes: weights, optimizer,
reference), run.json (the step, the data's order) and manifest.json (every file's size and SHA-256). A kill at any
moment leaves at worst a directory whose name starts with a dot, which the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.ranks import Ranks

PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint. Example: Checkpoint(path=Path("runs/a/checkpoints/step-000050"), step=50)."""

    path: Path
    step: int

    @property
    def learner(self) -> Path:
        """The directory that the learner wrote."""
        return self.path / "learner"

    def run_state(self) -> dict[str, Any]:
        """The step and the data's order."""
        return json.loads((self.path / "run.json").read_text())


class Checkpoints:
    """The checkpoints of one run directory, the newest `keep` of them. Every rank of the job calls every method."""

    def __init__(self, run_dir: Path, *, keep: int, ranks: Ranks | None = None) -> None:
        self.directory, self.keep, self.ranks = run_dir / "checkpoints", keep, ranks or Ranks()

    def prepare(self, step: int, save_learner: Callable[[Path], None], run: dict[str, Any]) -> Path:
        """Write and verify a checkpoint beside the others; `publish` makes it count.

        save_learner is called on every rank with the directory to write to.

        Raises UserError where the disk is full or the directory cannot be written; older checkpoints stay as they are.
        """
        partial = self.directory / f"{PARTIAL}step-{step:06d}"
        try:
            if self.ranks.is_main:
                self._remove_partial()
                (partial / "learner").mkdir(parents=True)
            self.ranks.barrier()
            save_learner(partial / "learner")
            self.ranks.barrier()
            if self.ranks.is_main:
                (partial / "run.json").write_text(json.dumps({"step": step, **run}))
                _seal(partial, step)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"checkpoint of step {step} cannot be written to {self.directory}: {error}; "
                "free space or choose another run.dir, then go on with resume=auto"
            ) from error
        return partial

    def publish(self, partial: Path) -> Checkpoint:
        """Give a prepared checkpoint its name and remove those beyond `keep`."""
        final = self.directory / partial.name.removeprefix(PARTIAL)
        if self.ranks.is_main:
            if final.exists():  # of a run that was resumed from an older step
                shutil.rmtree(final)
            partial.rename(final)
            _flush(self.directory)
            for old in self._all()[self.keep :]:
                shutil.rmtree(old)
        return Checkpoint(path=final, step=_step_of(final))

    def newest(self, notify: Callable[[str], object]) -> Checkpoint | None:
        """The newest whole checkpoint; `notify` hears the name of each broken one that is skipped."""
        return self.ranks.from_main(self._newest(notify) if self.ranks.is_main else None)

    def _newest(self, notify: Callable[[str], object]) -> Checkpoint | None:
        for path in self._all():
            problem = find_problem(path)
            if problem is None:
                return Checkpoint(path=path, step=_step_of(path))
            notify(f"checkpoint {path} is broken ({problem}); skipped")
        return None

    def remove_after(self, step: int) -> None:
        """Forget the future of a run that goes on from an older step, as its metrics do."""
        for path in self._all() if self.ranks.is_main else ():
            if _step_of(path) > step:
                shutil.rmtree(path)

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=_step_of, reverse=True)

    def _remove_partial(self) -> None:
        for path in self.directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at exactly this path. Raises UserError where it is none or is broken."""
    problem = find_problem(path)
    if problem is not None:
        raise UserError(f"resume={path}: {problem}; give a run's directory to take its newest whole checkpoint")
    return Checkpoint(path=path, step=_step_of(path))


def find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None: every file is read and compared with the manifest."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest or file: {error}"
    return None


def _seal(partial: Path, step: int) -> None:
    """Force every file to the disk and list it in the manifest."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    fingerprints = {str(path.relative_to(partial)): _fingerprint(path) for path in files}
    (partial / "manifest.json").write_text(json.dumps({"step": step, "files": fingerprints}))
    _flush(partial / "manifest.json")
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        _flush(folder)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """Force a file's, or a directory's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
