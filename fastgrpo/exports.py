"""The policy of every so many steps as a Hugging Face directory, for whoever evaluates it while the run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fastgrpo.manifest import flush
from fastgrpo.ranks import Ranks
from fastgrpo.step_directories import StepDirectories


class Exports:
    """exports/step-000050 and the like of one run directory. Every rank of the job calls every method.

    export: writes the policy into a directory (policy.export), on all ranks together.
    """

    def __init__(self, run_dir: Path, export: Callable[[Path], None], ranks: Ranks) -> None:
        self._steps, self._export, self._ranks = StepDirectories(run_dir / "exports"), export, ranks

    def write(self, step: int) -> None:
        """Write the policy as it is now, whole or not at all. Raises what `export` raises, and OSError."""
        if not self._ranks.is_main:
            return self._export(self._steps.partial(step))
        partial = self._steps.begin(step)
        try:
            self._export(partial)
            for path in (*partial.rglob("*"), partial):
                flush(path)
            self._steps.name(partial)
        except BaseException:  # a full disk is not to stay full
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def remove_after(self, step: int) -> None:
        """Forget the future of a run that goes on from an older step."""
        if self._ranks.is_main:
            self._steps.remove_after(step)
