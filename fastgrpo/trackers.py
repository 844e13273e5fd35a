"""Where a run's metrics go besides its files: TensorBoard, wandb, mlflow."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastgrpo.config import UserError


class Tracker(Protocol):
    """Somewhere else that a run's metrics go."""

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Record finite values of one step."""

    def close(self) -> None:
        """Send what is left."""


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None, run_name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        # Events of steps before a checkpoint are never written again, so they must not wait in a buffer.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, resume_step: int | None, run_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        known = _known_run(run_dir, "wandb") if resume_step is not None else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgrpo"),
            name=run_name,
            id=known,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=dict(config),
        )
        _remember_run(run_dir, "wandb", self._run.id)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        # After a resume wandb drops steps that it has already; a repeated step has the same values.
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run_dir: Path, resume_step: int | None, run_name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment("fastgrpo")
        known = _known_run(run_dir, "mlflow") if resume_step is not None else None
        run = mlflow.start_run(run_id=known, run_name=run_name)
        _remember_run(run_dir, "mlflow", run.info.run_id)
        # As a file: parameters are limited in number and length, and can never change in a resumed run.
        mlflow.log_dict(dict(config), "config.yaml")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({key.replace("@", "_at_"): value for key, value in row.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, int | None, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def begin_tracker(
    name: str, run_dir: Path, resume_step: int | None, run_name: str, config: Mapping[str, Any]
) -> Tracker:
    """Raise UserError where it cannot begin: no login, no route to its server, no room on the disk."""
    try:
        return TRACKERS[name](run_dir, resume_step, run_name, config)
    except Exception as error:  # another package's, over a network
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"run.trackers={name}: cannot begin ({reason}); mend that, or leave it out") from error


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for one that does not exist or is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"run.trackers={name}: choose any of {', '.join(TRACKERS)}")
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
            package = name if name == "tensorboard" else f"fastgrpo[{name}]"
            raise UserError(f"run.trackers={name}: {name} is not installed; pip install {package}")


def _known_run(run_dir: Path, tracker: str) -> str | None:
    path = run_dir / f"{tracker}_run_id"
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None


def _remember_run(run_dir: Path, tracker: str, run_id: str) -> None:
    (run_dir / f"{tracker}_run_id").write_text(run_id + "\n", encoding="utf-8")
