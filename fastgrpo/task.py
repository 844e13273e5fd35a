"""What a run is to learn, found wrong before weights are read: objective, prompts, rewards and environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.algorithms.advantages import Compare, comparison
from fastgrpo.algorithms.custom_advantage import CustomAdvantage
from fastgrpo.algorithms.objective import objective_of
from fastgrpo.config import Config, UserError
from fastgrpo.data import ALPHABET, PromptSets, load_prompts
from fastgrpo.data.replies import ReplyEncoder
from fastgrpo.environment.asking import Environment, load_environment
from fastgrpo.kernels.objective import Objective
from fastgrpo.learners import check_layout
from fastgrpo.models import hf, tiny
from fastgrpo.policy import QUICKSTART_CONTEXT, config_of_model
from fastgrpo.ranks import Ranks
from fastgrpo.rewards.scoring import Rewards
from fastgrpo.samplers import check_router_replay


@dataclass(frozen=True, kw_only=True)
class Task:
    """What completions are drawn for, answered and scored by, and compared and learned from."""

    objective: Objective
    compare: Compare
    """From rewards to advantages."""
    tokenizer: Any
    prompts: PromptSets
    rewards: Rewards
    environment: Environment | None
    """Answers the policy's turns; None where a completion is one turn."""

    @property
    def decode(self) -> Callable[[Tensor], str]:
        """From tokens to the text that people and reward functions read."""
        return partial(self.tokenizer.decode, skip_special_tokens=True)

    def close_workers(self) -> None:
        """End the processes of the user's functions, where nobody will ask them."""
        self.rewards.close()
        if self.environment is not None:
            self.environment.close()


@contextmanager
def load_task(
    config: Config,
    ranks: Ranks,
    reward: Callable[..., Any] | None,
    environment: Callable[..., Any] | None,
    *,
    needs_eval_prompts: bool,
) -> Iterator[Task]:
    """The task; at the end its workers are ended. reward, environment: functions in place of their paths.

    What is quick to find wrong comes first: functions, then data, then how both go with the model. Raises UserError.
    """
    objective = objective_of(config.algorithm, temperature=config.sampling.temperature)
    compare = comparison(config.algorithm)
    with ExitStack() as stack:
        rewards = stack.enter_context(Rewards(config.reward, reward))
        responds = load_environment(config.environment, environment)
        tokenizer, prompts = load_data(config)
        vocab_size = check_model(config, tokenizer, prompts, ranks, needs_eval_prompts=needs_eval_prompts).vocab_size
        check_reference(config, objective, tokenizer, vocab_size, longest_sequence(config, prompts))
        rewards.check(*prompts.kinds, group_size=config.algorithm.group_size)
        if isinstance(compare, CustomAdvantage):
            compare.check(prompts.train[0], rewards.names, config.algorithm.group_size)
        answers = None
        if responds is not None:
            encode = ReplyEncoder(config.data, tokenizer, vocab_size=vocab_size)
            answers = stack.enter_context(Environment(config.environment, responds, encode, tokenizer))
            answers.check(*prompts.kinds)
        yield Task(
            objective=objective,
            compare=compare,
            tokenizer=tokenizer,
            prompts=prompts,
            rewards=rewards,
            environment=answers,
        )


def load_data(config: Config) -> tuple[Any, PromptSets]:
    """The policy's tokenizer and the prompts. Raises UserError for what is wrong with either."""
    if config.model.path is None:
        tokenizer: Any = tiny.character_tokenizer(ALPHABET)
        context = QUICKSTART_CONTEXT
    else:
        key = "model.tokenizer_path" if config.model.tokenizer_path else "model.path"
        tokenizer = hf.load_tokenizer(config.model.tokenizer_path or config.model.path, key)
        context = hf.load_config(config.model.path).max_position_embeddings
    room = context - config.max_new_tokens
    if room < 1:
        key = "sampling" if config.sampling.max_new_tokens == config.max_new_tokens else "eval"
        raise UserError(
            f"{key}.max_new_tokens={config.max_new_tokens}: the model's context of {context} tokens leaves no room "
            "for a prompt; lower it"
        )
    prompts = load_prompts(config.data, tokenizer, seed=config.seed, max_prompt_tokens=room)
    for prompt in prompts.eval if config.eval.by is not None else ():
        if config.eval.by not in prompt.metadata:
            there = ", ".join(prompt.metadata) or "none"
            raise UserError(
                f"eval.by={config.eval.by}: {prompt.prompt_id} has no such column; further ones are {there}"
            )
    longest = longest_sequence(config, prompts)
    if longest > config.learner.max_tokens_per_microbatch:
        raise UserError(
            f"learner.max_tokens_per_microbatch={config.learner.max_tokens_per_microbatch}: a prompt and its "
            f"completion can have {longest} tokens; raise it to at least that"
        )
    return tokenizer, prompts


def check_model(config: Config, tokenizer: Any, prompts: PromptSets, ranks: Ranks, *, needs_eval_prompts: bool) -> Any:
    """The model's configuration. Raises UserError where model, layout, tokenizer and prompts do not go together, before
    weights are read."""
    if needs_eval_prompts and not prompts.eval:
        raise UserError(
            f"data.eval_size={config.data.eval_size}: no held-out questions to measure on; raise it or give "
            "data.eval_path"
        )
    model_config = config_of_model(config, tokenizer)
    check_layout(config, model_config, ranks.num_ranks)
    check_router_replay(config, model_config)
    check_tokens(config, tokenizer, prompts, model_config.vocab_size)
    return model_config


def longest_sequence(config: Config, prompts: PromptSets) -> int:
    """The tokens that a training prompt and its completion can have."""
    return max(len(prompt.token_ids) for prompt in prompts.train) + config.sampling.max_new_tokens


def check_reference(config: Config, objective: Objective, tokenizer: Any, vocab_size: int, longest: int) -> None:
    """Raise UserError where another model is no reference, or reads other tokens than the policy's vocab_size, or fewer
    than `longest` at a time."""
    path, schedule = config.algorithm.reference.path, config.algorithm.reference.schedule
    where = f"{hf.REFERENCE_KEY}={path}" if path is not None else f"algorithm.reference.schedule={schedule}"
    if not objective.needs_reference and (path is not None or schedule != "fixed"):
        raise UserError(
            f"{where}: nothing asks for a reference; set algorithm.kl_coef, or have the surrogate ask for it"
        )
    if path is None:
        return
    # A tokenizer's class may add tokens that the model does not have.
    ours = {token: number for token, number in tokenizer.get_vocab().items() if number < vocab_size}
    if (Path(path).expanduser() / "tokenizer.json").is_file():
        theirs = hf.load_tokenizer(path, hf.REFERENCE_KEY).get_vocab()
        other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
        if other is not None:
            raise UserError(
                f"{where}: the policy's token {other!r} is number {ours[other]}, and there it is "
                f"{theirs.get(other, 'missing')}; give a model with the policy's tokens"
            )
    model_config, largest = hf.load_config(path, hf.REFERENCE_KEY), max(ours.values())
    if model_config.vocab_size <= largest:
        raise UserError(
            f"{where}: it has {model_config.vocab_size} tokens, and the policy's go up to {largest}; give another model"
        )
    context = model_config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"{where}: its context is of {context} tokens, and a prompt and its completion can have {longest}; lower "
            "sampling.max_new_tokens, or give another model"
        )


def check_tokens(config: Config, tokenizer: Any, prompts: PromptSets, vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have, to be read or to end a completion with."""
    for token in config.sampling.stop_token_ids or ():
        if not 0 <= token < vocab_size:
            raise UserError(f"sampling.stop_token_ids={token}: the model's tokens are 0 to {vocab_size - 1}; use those")
    read = (int(prompt.token_ids.max()) for prompt in [*prompts.train, *prompts.eval])
    largest = max(int(tokenizer.eos_token_id), *read)
    if largest >= vocab_size:
        key = "model.tokenizer_path" if config.model.tokenizer_path else "model.path"
        raise UserError(
            f"{key}={config.model.tokenizer_path or config.model.path}: its tokenizer makes token {largest}, and the "
            f"model's are 0 to {vocab_size - 1}; give the model's own tokenizer"
        )
