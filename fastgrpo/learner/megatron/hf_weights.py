"""Where weights come from: a Hugging Face directory, read tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.convert import Read

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def from_directory(path: str | Path) -> Read:
    """Read from the safetensors files of a directory; each call maps one tensor, so memory stays at one tensor.

    Raises UserError where the directory has none, or, on reading, where a tensor is not in them.
    """
    directory = Path(path).expanduser()
    files = _files(directory)

    def read(name: str) -> Tensor:
        if name in files:
            with safe_open(directory / files[name], framework="pt") as file:
                return file.get_tensor(name)
        stacked = _stacked(name)
        if stacked is None or stacked[0] not in files:
            raise UserError(f"model.path={path}: the weights hold no tensor {name!r}; the directory is not whole")
        with safe_open(directory / files[stacked[0]], framework="pt") as file:
            return stacked[2](file.get_slice(stacked[0])[stacked[1]])

    return read


def _stacked(name: str) -> tuple[str, int, Callable[[Tensor], Tensor]] | None:
    """Where an expert's matrix is in a checkpoint that stacks them: the stack's name, the index, and which part."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    if match[3] == "down":
        return f"{match[1]}.down_proj", int(match[2]), lambda expert: expert
    return f"{match[1]}.gate_up_proj", int(match[2]), lambda expert: expert.chunk(2)[match[3] == "up"]


def _files(directory: Path) -> dict[str, str]:
    """Each tensor's file."""
    if (directory / _INDEX).is_file():
        return json.loads((directory / _INDEX).read_text())["weight_map"]
    if not (directory / _SINGLE).is_file():
        raise UserError(
            f"model.path={directory}: no {_SINGLE} or {_INDEX} there; learner=megatron reads safetensors from a local "
            "directory (hf download MODEL --local-dir DIRECTORY)"
        )
    with safe_open(directory / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)
