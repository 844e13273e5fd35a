"""Directories of a run's steps, such as checkpoints/step-000050, each whole or absent.

They are made under a name that begins with a dot, flushed to the disk and then renamed: a kill at any moment leaves at
worst one with such a name, which the next removes, and a resume too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fastgrpo.manifest import flush

PARTIAL = ".partial-"


class StepDirectories:
    """Those in one directory, for the main rank alone to make, name and remove."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def partial(self, step: int) -> Path:
        """Where the step's is made."""
        return self.directory / f"{PARTIAL}step-{step:06d}"

    def begin(self, step: int) -> Path:
        """Make that, empty, and remove what a kill has left."""
        self._remove_partial()
        self.partial(step).mkdir(parents=True)
        return self.partial(step)

    def name(self, partial: Path) -> None:
        """Have it count. Its files are flushed already."""
        final = self.directory / partial.name.removeprefix(PARTIAL)
        if final.exists():  # of a run that was resumed from an older step
            shutil.rmtree(final)
        partial.rename(final)
        flush(self.directory)

    def newest_first(self) -> list[Path]:
        """All that have a name; not a copy of one that somebody has put beside them."""
        return sorted((p for p in self.directory.glob("step-*") if _step_of(p) >= 0), key=_step_of, reverse=True)

    def remove_after(self, step: int) -> None:
        """Forget the future of a run that goes on from an older step, as its metrics do."""
        self._remove_partial()
        for path in self.newest_first():
            if _step_of(path) > step:
                shutil.rmtree(path)

    def _remove_partial(self) -> None:
        for path in self.directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
