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
    """Its number among the rows of all files, from 0."""
    place: str
    """Where the user finds it."""
    values: dict[str, Any]
    """Column name to value."""


def not_empty(rows: list[Row], name: str | Path, key: str) -> list[Row]:
    """The rows themselves. Raises UserError where there are none."""
    if not rows:
        raise UserError(f"{key}={name} has no rows; give a file with at least one")
    return rows
