"""Parquet files."""

from __future__ import annotations

from fastgrpo.config import UserError
from fastgrpo.data.rows import Row, existing_file, not_empty


def read_parquet(path: str, key: str) -> list[Row]:
    """Reads all columns. Raises UserError for a file that is not Parquet, or damaged."""
    import pyarrow
    from pyarrow import parquet

    file = existing_file(path, key)
    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:  # OSError: a damaged page
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{key}={path} cannot be read as Parquet ({reason}); for JSON Lines set data=jsonl") from None
    rows = [Row(index=i, place=f"{path} row {i}", values=values) for i, values in enumerate(table.to_pylist())]
    return not_empty(rows, path, key)
