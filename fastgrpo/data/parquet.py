"""Parquet files."""

from __future__ import annotations

from pathlib import Path

from fastgrpo.config import UserError
from fastgrpo.data.rows import Row, not_empty


def read_parquet(path: Path, key: str, *, first: int) -> list[Row]:
    """Reads all columns, the rows numbered from `first` on.

    Raises UserError for a file that is not Parquet, or damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:  # OSError: a damaged page
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{key}={path} cannot be read as Parquet ({reason}); restore it, or name JSON Lines .jsonl"
        ) from None
    rows = [Row(index=first + i, place=f"{path} row {i}", values=values) for i, values in enumerate(table.to_pylist())]
    return not_empty(rows, path, key)
