"""What a checkpoint's files were when they were written: manifest.json, each file's size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.ranks import Ranks


@dataclass(frozen=True)
class Fingerprint:
    """What the manifest says of a file. Example: Fingerprint(bytes=3, sha256="ba7816bf...")."""

    bytes: int
    sha256: str


def write_file(path: Path, write: Callable[[], object]) -> Fingerprint:
    """Have a file written and forced to the disk. Raises what `write` raises, and OSError."""
    write()
    flush(path)
    return fingerprint(path)


def seal(directory: Path, step: int, files: dict[str, Fingerprint]) -> None:
    """List every file in the manifest: those given, and what the main rank has written beside them."""
    for path in (path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if name not in files:
            files[name] = write_file(path, lambda: None)
    manifest = {"step": step, "files": {name: vars(files[name]) for name in sorted(files)}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    flush(directory / "manifest.json")
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        flush(folder)


def find_problem(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, in words, or None, alike on all ranks: every file is read, by one of them, and
    compared with the manifest."""
    manifest = ranks.from_main(_read_manifest(path) if ranks.is_main else {})
    if isinstance(manifest, str):
        return manifest
    mine = ranks.deal(list(manifest.items()), cost=lambda entry: entry[1].bytes)[ranks.data_rank]
    return ranks.any_of(next((p for name, expected in mine if (p := _difference(path, name, expected))), None))


def _read_manifest(path: Path) -> dict[str, Fingerprint] | str:
    """Every file's fingerprint, or what is wrong with the manifest."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        return {name: Fingerprint(**expected) for name, expected in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable manifest or file: {error}"


def _difference(path: Path, name: str, expected: Fingerprint) -> str | None:
    try:
        return None if fingerprint(path / name) == expected else f"{name} is not what was written"
    except OSError as error:
        return f"no readable manifest or file: {error}"


def fingerprint(path: Path) -> Fingerprint:
    """What the file is now, all of it read."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Fingerprint(bytes=path.stat().st_size, sha256=digest)


def flush(path: Path) -> None:
    """Force a file's, or a directory's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
