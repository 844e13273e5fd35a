"""fastgrpo: GRPO training that is fast and lean. `fastgrpo.train(...)`, or `fastgrpo train` on the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.api import TrainResult as TrainResult
    from fastgrpo.api import train as train
    from fastgrpo.config import UserError as UserError

__version__ = "0.1.0"
__all__ = ["TrainResult", "UserError", "train"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: the command line answers --help without loading torch."""
    import importlib

    if name in ("TrainResult", "train"):
        return getattr(importlib.import_module("fastgrpo.api"), name)
    if name == "UserError":
        return getattr(importlib.import_module("fastgrpo.config"), name)
    raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
