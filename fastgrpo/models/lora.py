"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT: the base is frozen, A and B alone are trained.

The base without its adapters is the policy as it was before training, so the KL term's reference costs no memory.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import LoraConfig, UserError
from fastgrpo.kernels.cpu_linear import use_cpu_linear
from fastgrpo.models import storage
from fastgrpo.models.hf import CausalLM, load_skeleton
from fastgrpo.models.storage import PRODUCTS
from fastgrpo.types import WeightSlice


class Adapters:
    """The adapters inside a model whose modules PEFT has replaced in place."""

    def __init__(self, model: CausalLM, peft_model: Any) -> None:
        self._model, self._peft_model = model, peft_model
        self._merged: dict[str, Tensor] = {}

    @property
    def config(self) -> Any:
        """PEFT's own configuration of them."""
        return self._peft_model.peft_config["default"]

    def modules(self) -> Iterator[tuple[str, Any]]:
        """The matrices that have adapters, as PEFT's modules, by their paths in the model."""
        return ((path, module) for path, module in self._model.named_modules() if _has_adapters(module))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained, named as by `model.layers.0.self_attn.q_proj.lora_A.weight`."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield storage.without_peft(name), parameter.detach()

    def shapes(self) -> dict[str, tuple[int, float]]:
        """The rank r and the scale s of W + s B A, by the matrix's path in the model."""
        return {path: (module.r["default"], module.scaling["default"]) for path, module in self.modules()}

    @torch.no_grad()
    def keep_merged(self) -> None:
        """From now on hold W + s B A too, for a sampler that knows no adapters: a second copy of the adapted matrices.

        A layer's q/k/v and gate/up lie side by side, as in models/storage.py, so they are all copied where one of them
        has adapters.
        """
        for path, module in self._model.named_modules():
            children = dict(module.named_children())
            for names in PRODUCTS:
                parts = [children.get(name) for name in names]
                if any(_has_adapters(part) for part in parts):
                    whole = torch.cat([_base(part).weight for part in parts])
                    sizes = [len(_base(part).weight) for part in parts]
                    self._merged |= {f"{path}.{n}": rows for n, rows in zip(names, whole.split(sizes), strict=True)}
        self.merge()

    @property
    def are_kept_merged(self) -> bool:
        return bool(self._merged)

    @torch.no_grad()
    def merge(self) -> None:
        """Bring the merged matrices up to date, where they are kept."""
        for path, merged in self._merged.items():
            module = self._model.get_submodule(path)
            merged.copy_(_base(module).weight)
            if _has_adapters(module):
                merged.add_(module.get_delta_weight("default"))

    def merged_slices(self) -> list[WeightSlice]:
        """The merged matrices, and what has no adapters, under their names in a checkpoint of the whole policy."""
        return [
            replace(held, tensor=self._merged.get(held.name.removesuffix(".weight"), held.tensor))
            for held in storage.weight_slices(self._model)
            if ".lora_" not in held.name
        ]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model computes as the base does."""
        with self._peft_model.disable_adapter():
            yield

    def drop(self) -> None:
        """Free the memory of all tensors; what is left can write a directory of others."""
        self._model.to("meta")

    def save_pretrained(self, directory: str | os.PathLike, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write a PEFT directory, which transformers, PEFT and vLLM load beside the base model.

        tensors: what to write in place of the adapters held here, under the names of `named`.
        """
        state = None
        if tensors is not None:
            names = [name for name, parameter in self._peft_model.named_parameters() if parameter.requires_grad]
            state = {name: tensors[storage.without_peft(name.removeprefix("base_model.model."))] for name in names}
        self._peft_model.save_pretrained(directory, state_dict=state)
        Path(directory, "README.md").unlink(missing_ok=True)  # PEFT's form for a hub page, all of it blank


def _has_adapters(module: Any) -> bool:
    return hasattr(module, "base_layer")


def _base(module: Any) -> Any:
    return module.base_layer if _has_adapters(module) else module


def add_adapters(model: CausalLM, config: LoraConfig, *, seed: int) -> Adapters:
    """Freeze the model and put fresh adapters of rank config.rank, or those of config.path, beside its matrices.

    Fresh ones leave the model's outputs as they were, because B begins at zero. They are float32 whatever the base is.
    Raises UserError where PEFT is not installed, a target names no matrix, or config.path fits no adapter.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError(f"model.lora: {error.name} is not installed; pip install fastgrpo[lora]") from None
    with warnings.catch_warnings():  # PEFT looks at names that newer transformers want called otherwise
        warnings.simplefilter("ignore", FutureWarning)
        return _ready(
            model, _fresh(peft, model, config, seed) if config.path is None else _load(peft, model, config.path)
        )


def _fresh(peft: Any, model: CausalLM, config: LoraConfig, seed: int) -> Any:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(config.target_modules) - (names - {"lm_head"}))
    if unknown:
        raise UserError(
            f"model.lora.target_modules: the model has no matrix {unknown[0]!r}; "
            f"choose among {', '.join(sorted(names - {'lm_head'}))}"
        )
    shape = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules),
        use_rslora=config.rank_stabilized,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, shape)


def add_to_skeleton(path: str, config: LoraConfig, *, dtype: torch.dtype, seed: int) -> Adapters:
    """add_adapters' very tensors, beside a model without weights, for a learner that holds weights elsewhere."""
    model = load_skeleton(path, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # PEFT moves adapters to the matrix's device; on `meta` they would be lost
            nothing = torch.zeros((), dtype=dtype).expand(module.weight.shape)
            module.weight = nn.Parameter(nothing, requires_grad=False)
    return add_adapters(model, config, seed=seed)


def _load(peft: Any, model: CausalLM, path: str) -> Any:
    directory = Path(path).expanduser()
    if not (directory / "adapter_config.json").is_file():
        raise UserError(f"model.lora.path={path}: no adapter_config.json there; give a PEFT directory")
    try:
        loaded = peft.PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.lora.path={path}: does not fit model.path: {reason}") from error
    for key in ("use_dora", "lora_bias"):
        if getattr(loaded.peft_config["default"], key):
            raise UserError(f"model.lora.path={path}: its {key} is more than low-rank matrices; use plain LoRA")
    return loaded


def rank_and_targets(config: LoraConfig) -> tuple[int, list[str]]:
    """The adapters' rank and the names of the matrices that have some. Raises UserError as add_adapters does."""
    if config.path is None:
        return config.rank, config.target_modules
    file = Path(config.path).expanduser() / "adapter_config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return int(saved["r"]), list(saved["target_modules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.lora.path={config.path}: no readable adapter_config.json there; give a PEFT directory"
        ) from error


def _ready(model: CausalLM, peft_model: Any) -> Adapters:
    if model.device.type == "cpu":
        use_cpu_linear(model)
    return Adapters(model, peft_model)
