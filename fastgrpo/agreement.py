"""What must be alike on all nodes of a job, found out before anything is computed.

Each node has a command line and disks of its own. Where they differ, ranks would wait for each other for ever, or learn
from different data without a word.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastgrpo.config import Config
from fastgrpo.data import PromptSets
from fastgrpo.data_files import shown
from fastgrpo.functions.loading import source_of
from fastgrpo.nodes import JobError, first_of_node, num_nodes, whoami
from fastgrpo.ranks import Ranks
from fastgrpo.types import Prompt

PATIENCE_S = 10.0
"""What a network file system has for showing a node what another has written."""
COMPARED = ("*.safetensors", "config.json", "generation_config.json", "adapter_config.json", "adapter_model.bin")
"""A model's or adapters' files that decide what is computed, or where a completion ends."""
NUM_PIECES, PIECE_BYTES = 16, 1 << 16
"""What is read of a large file."""


def check_settings(config: Config, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where a node was started with other settings; paths may be each node's own."""
    if num_nodes() == 1:
        return
    mine = dict(_flat(asdict(config)))
    expected = ranks.from_main(mine)
    key = next((key for key in {**expected, **mine} if expected.get(key) != mine.get(key)), None)
    mend = "start all nodes with the same settings"
    _refuse(key and f"{key}={expected.get(key)}: {whoami()} has {mine.get(key)}; {mend}", ranks)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif not name.endswith(("path", "dir")):
            yield prefix + name, value


def check_run_dir(config: Config, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where a node does not see the run's directory or cannot write there.

    The main rank has made it.
    """
    if num_nodes() == 1:
        return
    run_dir = Path(config.run.dir).expanduser().absolute()
    mark = run_dir / ranks.from_main(f".seen-by-all-{uuid4().hex}")
    if ranks.is_main:
        mark.touch()
    ranks.barrier()
    problem = _why_not_shared(mark, ranks.rank)
    try:
        mend = "give a directory on a file system that all nodes share"
        _refuse(problem and f"run.dir={config.run.dir}: {whoami()} {problem} ({run_dir}); {mend}", ranks)
    finally:
        if ranks.is_main:
            mark.unlink()


def _why_not_shared(mark: Path, rank: int) -> str | None:
    """What is wrong with the directory in which the main rank has made this file, or None."""
    deadline = time.monotonic() + PATIENCE_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return "does not see what rank 0 writes there"
        time.sleep(0.5)
    mine = mark.with_name(f"{mark.name}-{rank}")
    try:
        mine.touch()
        mine.unlink()
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return None


def check_model(key: str, directory: str, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where a node's directory holds another model: other files, by name, size and
    samples of what is in them."""
    _compare(key, directory, lambda: _digest_of_files(Path(directory).expanduser()), ranks)


def check_prompts(config: Config, prompts: PromptSets, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where a node has other prompts, in words or in tokens."""
    _compare("data.path", shown(config.data.path), lambda: _digest_of_prompts([*prompts.train, *prompts.eval]), ranks)


def check_functions(config: Config, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where a node has another file for a function that the configuration names. What
    that file imports is not compared. The functions must have been loaded."""
    paths = {
        "reward.path": config.reward.path,
        **{f"reward.extra.{name}.path": term.path for name, term in config.reward.extra.items()},
        "environment.path": config.environment.path,
        "algorithm.surrogate": config.algorithm.surrogate,
        "algorithm.advantage": config.algorithm.advantage,
    }
    for key, path in paths.items():
        _compare(key, path or "null", partial(_digest_of_source, path or ""), ranks)


def _compare(key: str, value: str, digest: Callable[[], str], ranks: Ranks) -> None:
    if num_nodes() == 1:
        return
    mine = digest() if first_of_node() else None
    expected = ranks.from_main(mine)
    problem = f"{key}={value}: what {whoami()} finds there is not what rank 0 finds; give all nodes the same"
    _refuse(problem if mine not in (None, expected) else None, ranks)


def _digest_of_files(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in (path for pattern in COMPARED for path in sorted(directory.glob(pattern))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for begin in range(0, size, max(PIECE_BYTES, size // NUM_PIECES)):
                file.seek(begin)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _digest_of_source(path: str) -> str:
    """Of the file that holds the function; of nothing where there is none, as for __main__ in a notebook."""
    file = source_of(path)
    return hashlib.sha256(b"" if file is None else file.read_bytes()).hexdigest()


def _digest_of_prompts(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer!r}\0".encode("utf-8", "surrogatepass"))
        digest.update(prompt.token_ids.numpy().tobytes())
    return digest.hexdigest()


def _refuse(problem: str | None, ranks: Ranks) -> None:
    """Raise the first rank's problem on all of them."""
    problem = ranks.any_of(problem)
    if problem is not None:
        raise JobError(problem)
