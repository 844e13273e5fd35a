"""Going on where a checkpoint found everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgrpo.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from fastgrpo.config import Config, UserError
from fastgrpo.data import PromptSets, PromptStream
from fastgrpo.learner.protocol import Learner
from fastgrpo.metrics import MetricsLog
from fastgrpo.unfinished import Unfinished


def find_checkpoint(config: Config, checkpoints: Checkpoints, notify: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that config.resume asks for. Raises UserError where a path was given and holds none."""
    if config.resume == "no":
        return None
    if config.resume == "auto":
        return checkpoints.newest(notify)
    path = Path(config.resume).expanduser()
    if path.name.startswith("step-") or (path / "manifest.json").is_file():
        return open_checkpoint(path, checkpoints.ranks)
    found = Checkpoints(path, keep=1, ranks=checkpoints.ranks).newest(notify)
    if found is None:
        raise UserError(f"resume={config.resume}: no whole checkpoint there; give a run's directory, auto or no")
    return found


def restore(
    checkpoint: Checkpoint, learner: Learner, stream: PromptStream, unfinished: Unfinished, prompts: PromptSets
) -> dict[str, Any]:
    """Put everything where the checkpoint found it; returns the rest of what it tells of the run.

    Raises UserError where it is of another model or other data.
    """
    state = checkpoint.run_state()
    learner.load(checkpoint.learner)
    stream.load_state_dict(state["stream"])
    unfinished.load_state_dict(state["unfinished"], prompts.train)
    return state


def open_log(config: Config, run_dir: Path, step: int | None, notify: Callable[[str], None]) -> MetricsLog:
    """The run's metrics.jsonl and trackers, going on after `step`; None: there was no checkpoint to go on from.

    Raises UserError where they cannot be written."""
    nothing_kept = -1 if config.resume != "no" else None  # killed before its first checkpoint; or a new run
    try:
        return MetricsLog(
            run_dir,
            config.run.trackers,
            resume_step=nothing_kept if step is None else step,
            run_name=config.run.name,
            config=asdict(config),
            notify=notify,
        )
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: {error}; make room or mend the disk, then try again") from error
