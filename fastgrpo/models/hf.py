"""Hugging Face models and tokenizers: loaded, checked, laid out for the decoder (decoder.py), and written back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from fastgrpo.config import UserError
from fastgrpo.kernels.cpu_linear import use_cpu_linear
from fastgrpo.models.decoder import CausalLM
from fastgrpo.models.shape import MODEL_TYPES
from fastgrpo.models.storage import lay_out

# These rotate by the longest position of a batch, so a token's logits would depend on its neighbours.
UNSUPPORTED_ROPE_TYPES = ("dynamic", "longrope")


hf_logging.disable_progress_bar()


REFERENCE_KEY = "algorithm.reference.path"
MODEL_KEYS = ("model.path", REFERENCE_KEY)


def _check_supported(config: Any, where: str) -> None:
    if _has_window(config):  # before the type: of a Mistral with layer_types transformers makes a Ministral
        raise UserError(f"{where}: sliding-window attention is not supported; use a model without it")
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: model type {config.model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in UNSUPPORTED_ROPE_TYPES:
        raise UserError(f"{where}: rotary type {rope!r} is not supported; use default, linear, llama3 or yarn")


def _has_window(config: Any) -> bool:
    """Whether transformers or vLLM would show a token only the last so many before it."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return True
    if config.model_type in ("qwen2", "qwen3"):  # theirs is in the layers that layer_types names, the others' in all
        return False
    return getattr(config, "sliding_window", None) is not None


def _local_or_hub(key: str, path: str) -> str:
    """Refuse what can be neither a model directory nor a hub name, before Hugging Face's own long error."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        if key in MODEL_KEYS and not (directory / "config.json").is_file():
            if (directory / "adapter_config.json").is_file():
                raise UserError(f"{key}={path}: adapters alone; give them as model.lora.path, and their base here")
            raise UserError(f"{key}={path}: the directory has no config.json; give a Hugging Face model directory")
        return str(directory)
    if directory.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key}={path}: no such directory; give a Hugging Face model directory or a hub name")
    return path


def load_config(path: str, key: str = "model.path") -> Any:
    """The configuration of a model that fastgrpo can run. Raises UserError as load_model does."""
    source = _local_or_hub(key, path)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}={path}: cannot be loaded: {_first_line(error)}") from error
    _check_supported(config, f"{key}={path}")
    return config


def load_model(path: str, *, device: str, dtype: torch.dtype, key: str = "model.path") -> CausalLM:
    """The causal language model of a local directory or hub name, ready for the decoder.

    Raises UserError, naming the key, where it is no model, cannot be read, or is of a type that is not supported.
    """
    config = load_config(path, key)
    source = _local_or_hub(key, path)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{key}={path}: cannot be loaded: {_first_line(error)}") from error
    model: CausalLM = found[0]
    if missing := sorted(found[1]["missing_keys"]):  # transformers would draw them at random
        raise UserError(
            f"{key}={path}: its files lack {len(missing)} of the weights that config.json describes, such as "
            f"{missing[0]}; complete the directory"
        )
    return prepare(model.to(device))


def load_skeleton(path: str, *, dtype: torch.dtype) -> CausalLM:
    """The model without memory for its weights (on the meta device), for who holds them elsewhere."""
    config = load_config(path)
    with torch.device("meta"):
        model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = _generation_config(_local_or_hub("model.path", path)) or model.generation_config
    return model


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a directory need not have one
        return None


def prepare(model: CausalLM) -> CausalLM:
    """What every model that learner and sampler run goes through, however it was made."""
    lay_out(model)
    if model.device.type == "cpu":
        use_cpu_linear(model)
    return model


def load_tokenizer(path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub name.

    Raises UserError where there is none, or where it has no end-of-sequence token (completions could never stop).
    """
    source = _local_or_hub(key, path)
    try:
        # Where mistral-common is installed, as vLLM wants it, transformers would rather read a Mistral's tekken.json.
        tokenizer = AutoTokenizer.from_pretrained(source, mistral_format=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{key}={path}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None or _made_up(tokenizer.eos_token, Path(source) / "tokenizer.json"):
        raise UserError(
            f"{key}={path}: the tokenizer has no EOS token, so completions cannot end; "
            "set eos_token in its tokenizer_config.json, or model.tokenizer_path to another directory"
        )
    return tokenizer


def _made_up(token: str, file: Path) -> bool:
    """Whether transformers added the token by itself: a model type's tokenizer class brings an EOS of its own, which
    the model has never seen."""
    return file.is_file() and Tokenizer.from_file(str(file)).token_to_id(token) is None


def stop_token_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's and the generation configuration's."""
    listed = getattr(model, "generation_config", None)
    ids = listed.eos_token_id if listed is not None else None
    more = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, more)}))


def save_pretrained(model: CausalLM, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike) -> None:
    """Write a Hugging Face directory (safetensors) that AutoModelForCausalLM loads; of adapters, a PEFT directory."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
