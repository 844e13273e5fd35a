"""The quickstart's starting point: a tiny policy taught from worked solutions until it is right now and then.

Supervised learning is REINFORCE with every advantage 1, so the learner's own update does it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from fastgrpo.algorithms.aggregation import token_weights
from fastgrpo.config import Config, TrainConfig, UserError, WarmStartConfig
from fastgrpo.data import PromptStream
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.hf import CausalLM, save_pretrained
from fastgrpo.nodes import first_of_node
from fastgrpo.ranks import Ranks
from fastgrpo.rewards.verifiable import exact_match
from fastgrpo.sampler.torch_sampler import TorchSampler
from fastgrpo.seeding import derive_seed
from fastgrpo.types import Prompt, SamplingParams

CHECK_EVERY = 10
NUM_CHECKED = 256
MAX_TOKENS = 8192
OF_NO_MATTER = ("cache_dir", "lora", "tokenizer_path")
"""Keys of `model` that do not change the warm-started model."""


def cached_path(config: Config, alphabet: str) -> Path:
    """Where the warm-started model of this configuration is, or will be, kept."""
    made_by = {
        "model": {key: value for key, value in asdict(config.model).items() if key not in OF_NO_MATTER},
        "operation": config.data.operation,
        "num_digits": config.data.num_digits,
        "num_problems": config.data.num_problems,
        "seed": config.seed,
        "alphabet": alphabet,
        "version": 1,  # raise it when the recipe below changes
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.model.cache_dir).expanduser() / f"warm-start-{digest}"


def warm_start(
    model: CausalLM,
    tokenizer,
    prompts: list[Prompt],
    config: WarmStartConfig,
    *,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Teach `model` in place on the prompts' metadata["solution"] until it samples target_accuracy right answers.

    Raises UserError where max_steps do not reach it.
    """
    rates = TrainConfig(learning_rate=config.learning_rate, warmup_steps=20, adam_beta2=0.99)
    learner = TorchLearner(model, rates, num_updates=config.max_steps)
    sampler = TorchSampler(model)
    stream = PromptStream(prompts, seed=seed, shuffle=True)
    solutions = {p.prompt_id: _solution_ids(tokenizer, p) for p in prompts}
    params = SamplingParams(
        max_new_tokens=max(map(len, solutions.values())) + 8, stop_token_ids=(tokenizer.eos_token_id,)
    )
    for step in range(1, config.max_steps + 1):
        batch = _supervised(stream.take(config.batch_size), solutions)
        learner.update(pack(batch, max_tokens=MAX_TOKENS, share_prompts=True), Objective(surrogate="reinforce"))
        if step % CHECK_EVERY:
            continue
        groups = sampler.generate(prompts[:NUM_CHECKED], 1, params, derive_seed(seed, "warm start", step))
        answers = [tokenizer.decode(g.rollouts[0].token_ids, skip_special_tokens=True) for g in groups]
        right = [exact_match(text, g.prompt.answer) for text, g in zip(answers, groups, strict=True)]
        accuracy = sum(right) / len(right)
        report(f"warm start: step {step}, {accuracy:.0%} of sampled answers right")
        if accuracy >= config.target_accuracy:
            return
    raise UserError(
        f"model.warm_start.max_steps={config.max_steps}: the policy did not reach "
        f"model.warm_start.target_accuracy={config.target_accuracy}; raise the steps, or lower the target"
    )


def _solution_ids(tokenizer, prompt: Prompt) -> torch.Tensor:
    ids = tokenizer(prompt.metadata["solution"], add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.eos_token_id])


def _supervised(prompts: list[Prompt], solutions: dict[str, torch.Tensor]) -> list[Sequence]:
    masks = [torch.ones(len(solutions[p.prompt_id]), dtype=torch.bool) for p in prompts]
    weights = token_weights(masks, "token_mean", max_new_tokens=1)
    return [
        Sequence(
            sequence_id=i,
            group_id=i,
            prompt_ids=prompt.token_ids,
            token_ids=solutions[prompt.prompt_id],
            advantages=torch.ones_like(weight),
            token_weights=weight,
            sampler_logprobs=torch.zeros_like(weight),
        )
        for i, (prompt, weight) in enumerate(zip(prompts, weights, strict=True))
    ]


def reserve(path: Path) -> None:
    """See that `store` will be able to write, before minutes are spent on what it is to keep.

    Raises UserError where it will not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(f"model.cache_dir={path.parent}: cannot be written: {error}; choose another") from error


def store(model: CausalLM, tokenizer, path: Path) -> None:
    """Keep the model at `path`, whole or not at all."""
    with _beside(path) as directory:
        save_pretrained(model, tokenizer, directory)


def hand_out(path: Path, ranks: Ranks) -> None:
    """Copy what the main rank keeps at `path` to the nodes that have nothing there, because their cache is their own.

    Every rank of the job calls it.
    """
    ranks.barrier()
    if not any(ranks.everyone(not path.is_dir())):
        return
    files = ranks.from_main({file.name: file.read_bytes() for file in path.iterdir()} if ranks.is_main else {})
    if first_of_node() and not path.is_dir():
        reserve(path)
        with _beside(path) as directory:
            directory.mkdir()
            for name, content in files.items():
                (directory / name).write_bytes(content)
    ranks.barrier()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory, still to be made, that becomes `path` when the block is done."""
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as beside:
        yield Path(beside, "hf")
        try:
            Path(beside, "hf").rename(path)
        except OSError:
            if not path.is_dir():  # else another run was first, with the same
                raise
