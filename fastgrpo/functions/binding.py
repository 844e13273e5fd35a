"""The keyword arguments of a call. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.contract import UserFunction


def arguments_of(
    function: UserFunction, offered: Mapping[str, Any], columns: Mapping[str, Any], prompt_id: str
) -> dict[str, Any]:
    """What the function asks for, of what is offered by name and of the prompt's columns in the data.

    Configured arguments come before columns of the same name. Raises UserError for a parameter that nothing fills.
    """
    asked = {name: value for name, value in offered.items() if name in function.parameters}
    free = {name: value for name, value in columns.items() if name not in function.offered} | function.kwargs
    if not function.takes_columns:
        free = {name: value for name, value in free.items() if name in function.parameters}
    missing = [name for name in function.required if name not in asked and name not in free]
    if missing:
        there = ", ".join(columns) or "none"
        raise UserError(
            f"{function.key}={function.path} asks for `{missing[0]}`, which is neither one of "
            f"{', '.join(function.offered)} nor a column of {prompt_id} ({there}); rename it, give it a default or set "
            f"{function.key.removesuffix('path').removesuffix('.')}.kwargs.{missing[0]}"
        )
    return {**free, **asked}
