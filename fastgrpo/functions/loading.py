"""From a path in the configuration, or a callable, to a function and what its signature says. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.contract import UserFunction


def load_function(path: str, key: str) -> Callable[..., Any]:
    """The function itself. Raises UserError where there is none."""
    place, separator, function_name = path.rpartition(":")
    if not separator or not place or not function_name:
        raise UserError(f"{key}={path} names no function; write module:function or file.py:function")
    module = _import_file(place, path, key) if place.endswith(".py") else _import_module(place, path, key)
    function = module
    for part in function_name.split("."):
        if not hasattr(function, part):
            there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UserError(
                f"{key}={path}: {place} has no {function_name!r}; it has {', '.join(there) or 'no function'}"
            )
        function = getattr(function, part)
    if not callable(function):
        raise UserError(f"{key}={path} is not a function but {function!r:.40}; name a function")
    return function


def source_of(path: str) -> Path | None:
    """The file of a function that has been loaded by this path, or None."""
    place = path.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return Path(file).expanduser() if file else None


def _import_file(place: str, path: str, key: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{key}={path}: there is no file {place} (looked in {Path.cwd()}); correct the path")
    # Its own name: two files called rewards.py, or one called like an installed package, must not collide. And it is
    # read again where it has changed since: a notebook's user mends it and trains again.
    digest = hashlib.sha256(str(file).encode() + file.read_bytes())
    module_name = f"fastgrpo_user_{file.stem}_{digest.hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        raise _import_error(error, path, key, "mend the file") from error
    return module


def _import_module(place: str, path: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except BaseException as error:
        mend = "install it, or name a file: FILE.py:FUNCTION"
        raise _import_error(error, path, key, mend) from error


def _import_error(error: BaseException, path: str, key: str, mend: str) -> BaseException:
    if isinstance(error, (KeyboardInterrupt, UserError)):
        return error
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{key}={path} does not import ({reason}); {mend}")


def name_of(function: Any, what: str) -> str:
    """A name for a callable that came without a path. Raises UserError where it is none."""
    if not callable(function):
        raise UserError(f"the {what} is a {type(function).__name__} ({function!r:.40}); give a function")
    unwrapped = inspect.unwrap(getattr(function, "func", function))
    return getattr(unwrapped, "__name__", type(unwrapped).__name__)


def describe(
    function: Callable[..., Any],
    *,
    path: str,
    key: str,
    kwargs: Mapping[str, Any],
    reserved: Iterable[str],
    contract: Callable[[list[str]], tuple[tuple[str, ...], Callable[[Any], Any]]],
    kwargs_key: str | None = None,
) -> UserFunction:
    """Reads from the signature how the function is called.

    reserved: the names that kwargs may not set. contract: from the parameters' names to UserFunction's `offered` and
    `read`. kwargs_key: where the configuration holds kwargs, if not beside the path.
    Raises UserError, as `contract` may, where they do not fit.
    """
    where = f"{key}={path}"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"{where} does not tell its parameters; wrap it in a Python function") from None
    takes_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise UserError(f"{where} has positional-only parameters, but all are passed by name; remove the `/`")
    offered, read = contract(names)
    kwargs_key = kwargs_key or key.removesuffix("path") + "kwargs"
    for argument in kwargs:
        if argument in reserved or (argument not in names and not takes_columns):
            raise UserError(
                f"{kwargs_key}.{argument}: {path} has no parameter of that name to set; "
                f"it has {listed(n for n in names if n not in offered)}"
            )
    return UserFunction(
        key=key,
        path=path,
        function=function,
        kwargs=dict(kwargs),
        offered=offered,
        read=read,
        is_async=_is_async(function),
        parameters=tuple(names),
        required=tuple(p.name for p in named if p.default is p.empty),
        takes_columns=takes_columns,
    )


def _is_async(function: Callable[..., Any]) -> bool:
    function = getattr(function, "func", function)  # functools.partial
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def listed(names: Iterable[str]) -> str:
    """Names for an error's one line."""
    return ", ".join(f"`{name}`" for name in names) or "nothing"
