"""From a path in the configuration, or a callable, to a RewardFunction. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.loading import describe, listed, load_function
from fastgrpo.rewards.contract import PER_COMPLETION, PER_GROUP, RewardFunction, normalize


def load_reward(
    path: str,
    *,
    key: str = "reward.path",
    name: str | None = None,
    weight: float = 1.0,
    kwargs: Mapping[str, Any] | None = None,
) -> RewardFunction:
    """Loads "module:function" or "file.py:function".

    Raises UserError, naming the key and the path, where it does not import, has no such function, or the function
    does not ask for what the contract offers.
    """
    return describe_reward(load_function(path, key), path=path, key=key, name=name, weight=weight, kwargs=kwargs)


def describe_reward(
    function: Callable[..., Any],
    *,
    path: str,
    key: str = "reward.path",
    name: str | None = None,
    weight: float = 1.0,
    kwargs: Mapping[str, Any] | None = None,
) -> RewardFunction:
    """Reads from the signature how the function is called. Raises UserError where that breaks the contract."""

    def contract(names: list[str]) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
        if ("completion" in names) == ("completions" in names):
            raise UserError(
                f"{key}={path} must ask for either `completion` or `completions`; it asks for {listed(names)}"
            )
        per_group = "completions" in names
        offered = PER_GROUP if per_group else PER_COMPLETION
        for parameter in names:
            if parameter in PER_GROUP + PER_COMPLETION and parameter not in offered:
                raise UserError(
                    f"{key}={path} asks for `{parameter}`, but with `{offered[0]}` there are {listed(offered)}"
                )
        return offered, partial(normalize, per_group=per_group)

    reserved = PER_GROUP + PER_COMPLETION
    described = describe(function, path=path, key=key, kwargs=kwargs or {}, reserved=reserved, contract=contract)
    per_group = described.offered is PER_GROUP
    return RewardFunction(**vars(described), name=name or path.rpartition(":")[2], weight=weight, per_group=per_group)
