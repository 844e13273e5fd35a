"""Functions of the objective: called in the trainer's own process, where their tensors are. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.calls import failure_of
from fastgrpo.functions.loading import describe, load_function


def is_path(name: str) -> bool:
    """Whether a setting names a function of the user's, module:function or file.py:function, and no choice of ours."""
    return ":" in name


class Inline:
    """A function by its path, given what it asks for by parameter name.

    key: the setting that names it; key_kwargs holds its fixed arguments. offered: the names that fastgrpo fills.
    Raises UserError, naming the key and the path, where there is no such function, or it asks for something else.
    """

    def __init__(self, path: str, key: str, kwargs: Mapping[str, Any], offered: tuple[str, ...]) -> None:
        def contract(names: list[str]) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
            return offered, lambda result: result

        self.where = f"{key}={path}"
        function = load_function(path, key)
        self._function = describe(
            function, path=path, key=key, kwargs=kwargs, reserved=offered, contract=contract, kwargs_key=f"{key}_kwargs"
        )
        if self._function.is_async:
            raise UserError(f"{self.where} is async; write a plain function, which is called where its tensors are")
        unknown = [name for name in self._function.required if name not in offered and name not in kwargs]
        if unknown:
            raise UserError(
                f"{self.where} asks for `{unknown[0]}`, which is none of {', '.join(offered)}; rename it, give it a "
                f"default or set {key}_kwargs.{unknown[0]}"
            )
        self.asks = frozenset(self._function.parameters).intersection(offered)

    def __call__(self, offered: Mapping[str, Any]) -> Any:
        """What the function returns. Raises UserError for whatever it raises, saying where."""
        given = {name: offered[name] for name in self.asks}
        try:
            return self._function.function(**self._function.kwargs, **given)
        except Exception as error:
            failure = failure_of(error)
            what = failure.message if failure.kind == "refused" else f"raised {failure.message}; mend the function"
            raise UserError(f"{self.where} {what}") from error
