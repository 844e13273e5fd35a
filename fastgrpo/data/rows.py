"""What every source hands on: rows of named columns, each with its place for error messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import UserError


@dataclass(frozen=True)
class Row:
    """One row of the data. Example: Row(index=17, place="train.jsonl line 18", values={"question": "2+3="})."""

    index: int
    """Its number among the rows, from 0."""
    place: str
    """Where the user finds it."""
    values: dict[str, Any]
    """Column name to value."""


def existing_file(path: str, key: str) -> Path:
    """The path as a file that is there. Raises UserError naming the key otherwise."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{key}={path} is a directory; name the file in it, or read all of its files with data=hub")
    if not file.is_file():
        raise UserError(f"{key}={path} does not exist (looked in {Path.cwd()}); correct the path")
    return file


def not_empty(rows: list[Row], name: str, key: str) -> list[Row]:
    """The rows themselves. Raises UserError where there are none."""
    if not rows:
        raise UserError(f"{key}={name} has no rows; give a file with at least one")
    return rows
