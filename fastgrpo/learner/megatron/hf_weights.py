"""Where weights come from: a Hugging Face directory, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.convert import Read

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def from_directory(path: str | Path) -> Read:
    """Read from the safetensors files of a directory; each call maps one tensor, so memory stays at one tensor.

    Raises UserError where the directory has none, or, on reading, where a tensor is not in them.
    """
    directory = Path(path).expanduser()
    files = _files(directory)

    def read(name: str) -> Tensor:
        if name not in files:
            raise UserError(f"model.path={path}: the weights hold no tensor {name!r}; the directory is not whole")
        with safe_open(directory / files[name], framework="pt") as file:
            return file.get_tensor(name)

    return read


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


def from_tensors(tensors: Mapping[str, Tensor]) -> Read:
    """Read from tensors in memory under their Hugging Face names, such as a model's state_dict()."""
    return tensors.__getitem__
