"""Several files as one set of rows."""

from __future__ import annotations

from typing import Any

from fastgrpo.data.jsonl import read_jsonl
from fastgrpo.data.parquet import read_parquet
from fastgrpo.data.rows import Row
from fastgrpo.data_files import find_files

READERS = {"jsonl": read_jsonl, "parquet": read_parquet}


def read_files(value: Any, key: str, source: str) -> tuple[list[Row], int]:
    """The rows of all files, numbered through, and how many files there are.

    A .jsonl or .parquet file is read as what it is, any other as `source` says. Raises UserError for what names no
    file, and for what cannot be read.
    """
    rows: list[Row] = []
    files = find_files(value, key)
    for file in files:
        read = READERS.get(file.suffix.removeprefix("."), READERS[source])
        rows += read(file, key, first=len(rows))
    return rows, len(files)
