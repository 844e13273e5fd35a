"""What is known of a function of the user's. Imports no torch: worker processes start from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unusable:
    """A returned value that breaks the contract, as text for the error. Example: Unusable("'good' (str)")."""

    shown: str


@dataclass(frozen=True)
class Failure:
    """A call that gave no value. Example: Failure(kind="error", message="ValueError: bad (rewards.py line 7)")."""

    kind: str
    """error | timeout | refused (the function raised UserError, which ends the run under every policy)."""
    message: str


@dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A function together with how it is called."""

    key: str
    """Where the configuration names it, such as reward.path or environment.path."""
    path: str
    """module:function or file.py:function, or the callable's own name."""
    function: Callable[..., Any]
    kwargs: dict[str, Any]
    """Fixed arguments, which come before columns of the same name."""
    offered: tuple[str, ...]
    """The names that fastgrpo fills."""
    read: Callable[[Any], Any]
    """Makes plain values that cross processes, or Unusable, of what a call returned; pickled into the workers."""
    is_async: bool
    parameters: tuple[str, ...]
    """Every parameter that can be passed by name."""
    required: tuple[str, ...]
    """Those without a default."""
    takes_columns: bool
    """It has **kwargs, which gets the data's columns."""

    @property
    def section(self) -> str:
        """Where the configuration holds its settings: reward or environment."""
        return section_of(self.key)


def section_of(key: str) -> str:
    """The first part of a configuration key."""
    return key.partition(".")[0]


def shown(value: Any) -> str:
    """A returned value as part of an error's one line."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if isinstance(value, float) or value is None else f"{text} ({type(value).__name__})"
