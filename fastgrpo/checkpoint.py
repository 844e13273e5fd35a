"""Checkpoints that are whole or absent: written beside, verified, then renamed.

A checkpoint is a directory checkpoints/step-000050 with learner.pt (weights, optimizer, reference), run.json (the
step, the data's order) and manifest.json (every file's size and SHA-256). A kill at any moment leaves at worst a
directory whose name starts with a dot, which the next save removes.
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

import torch

from fastgrpo.config import UserError

PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint. Example: Checkpoint(path=Path("runs/a/checkpoints/step-000050"), step=50)."""

    path: Path
    step: int

    def load(self, map_location: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
        """(the learner's state, the run's state)."""
        learner = torch.load(self.path / "learner.pt", map_location=map_location, weights_only=True, mmap=True)
        return learner, json.loads((self.path / "run.json").read_text())


class Checkpoints:
    """The checkpoints of one run directory, the newest `keep` of them."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self.directory, self.keep = run_dir / "checkpoints", keep

    def prepare(self, step: int, learner: dict[str, Any], run: dict[str, Any]) -> Path:
        """Write and verify a checkpoint beside the others; `publish` makes it count.

        Raises UserError where the disk is full or the directory cannot be written; older checkpoints stay as they are.
        """
        partial = self.directory / f"{PARTIAL}step-{step:06d}"
        try:
            self._remove_partial()
            partial.mkdir(parents=True)
            torch.save(learner, partial / "learner.pt")
            (partial / "run.json").write_text(json.dumps({"step": step, **run}))
            names = sorted(path.name for path in partial.iterdir())
            for name in names:
                _flush(partial / name)
            files = {name: _fingerprint(partial / name) for name in names}
            (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
            _flush(partial / "manifest.json")
            _flush(partial)
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
        if final.exists():  # of a run that was resumed from an older step
            shutil.rmtree(final)
        partial.rename(final)
        _flush(self.directory)
        for old in self._all()[self.keep :]:
            shutil.rmtree(old)
        return Checkpoint(path=final, step=_step_of(final))

    def newest(self, notify: Callable[[str], object]) -> Checkpoint | None:
        """The newest whole checkpoint; `notify` hears the name of each broken one that is skipped."""
        for path in self._all():
            problem = find_problem(path)
            if problem is None:
                return Checkpoint(path=path, step=_step_of(path))
            notify(f"checkpoint {path} is broken ({problem}); skipped")
        return None

    def remove_after(self, step: int) -> None:
        """Forget the future of a run that goes on from an older step, as its metrics do."""
        for path in self._all():
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
