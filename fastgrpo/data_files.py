"""From data.path and data.eval_path to the files that they name. Imports nothing heavy: `validate` asks too."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError

SUFFIXES = (".jsonl", ".parquet")
SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)
"""How the files of a data set's splits begin."""


def find_files(value: Any, key: str) -> list[Path]:
    """The files in the order in which they are read: a list's in its own, a pattern's and a directory's by name.

    Raises UserError for what names no file, a file that is named twice, and a directory of several splits, of which one
    is seldom to be trained on.
    """
    found: dict[Path, Path] = {}
    for name in names_in(value, key):
        path = Path(os.path.expanduser(name))
        files = _matches(path)
        if not files:
            raise UserError(f"{key}={name} {_why_nothing(path)}")
        if path.is_dir():
            _refuse_splits(path, files, key)
        for file in files:
            if found.setdefault(file.resolve(), file) is not file:
                raise UserError(f"{key}={shown(value)} names {file} twice; name it once")
    return list(found.values())


def names_in(value: Any, key: str) -> list[str]:
    """What the user has named, one or several. Raises UserError for what is no name."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(
            f"{key}={shown(value)}: give a file, a directory, a pattern such as 'train-*.parquet', or a list of these: "
            "[a.jsonl,b.parquet]"
        )
    return names


def shown(value: Any) -> str:
    """A value as one writes it on the command line. Example: shown(["a.jsonl", "b.jsonl"]) is "[a.jsonl,b.jsonl]"."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def kind_of(names: Iterable[str]) -> str | None:
    """The choice of data=... that goes with the first name that tells: jsonl or parquet; None where none does."""
    for path in (Path(os.path.expanduser(name)) for name in names if name):
        suffix = next((file.suffix for file in (path, *_matches(path)) if file.suffix in SUFFIXES), None)
        if suffix is not None:
            return suffix[1:]
        if path.is_dir() or _is_pattern(path):
            return "jsonl"  # which will say what is wrong with it
    return None


def _matches(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        within = [file for suffix in SUFFIXES for file in glob.glob(f"{glob.escape(str(path))}/*{suffix}")]
    else:
        within = glob.glob(str(path), recursive=True) if _is_pattern(path) else []
    return sorted(Path(file) for file in within if os.path.isfile(file))


def _is_pattern(path: Path) -> bool:
    return glob.escape(str(path)) != str(path)


def _why_nothing(path: Path) -> str:
    if path.is_dir():
        return "holds no .jsonl or .parquet file; name a directory that does, or the files"
    if _is_pattern(path):
        return f"matches no file (looked in {Path.cwd()}); correct the pattern"
    return f"does not exist (looked in {Path.cwd()}); correct the path"


def _refuse_splits(directory: Path, files: list[Path], key: str) -> None:
    splits = sorted({found[1] for file in files if (found := SPLIT.match(file.name))})
    if len(splits) > 1:
        patterns = " or ".join(f"'{directory / split}*'" for split in splits)
        raise UserError(f"{key}={directory} holds the files of several splits; name those of one: {patterns}")
