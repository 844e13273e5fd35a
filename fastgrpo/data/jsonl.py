"""JSON Lines: one object a line; blank lines are skipped."""

from __future__ import annotations

import json
from pathlib import Path

from fastgrpo.config import UserError
from fastgrpo.data.rows import Row, not_empty


def read_jsonl(path: Path, key: str, *, first: int) -> list[Row]:
    """Reads a UTF-8 file, its rows numbered from `first` on.

    Raises UserError, with file and line, for a line that is not a JSON object.
    """
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse(line, index=first + len(rows), place=f"{path} line {number}"))
    return not_empty(rows, path, key)


def _parse(line: bytes, index: int, place: str) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error.msg}, column {error.colno}); mend or remove the line") from None
    except RecursionError:
        raise UserError(f"{place} is nested too deeply to read; remove the line") from None
    if not isinstance(values, dict):
        raise UserError(f"{place} holds a {type(values).__name__}, not an object; write it as {{column: value, ...}}")
    return Row(index=index, place=place, values=values)
