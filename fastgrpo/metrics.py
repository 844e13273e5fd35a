"""What a run records: the step-time ledger, metrics.jsonl and samples.jsonl.

metrics.jsonl holds one JSON object a step, samples.jsonl one a completion. Both are the truth from which report.html
is made; trackers (trackers.py) receive copies. A float that is not finite is written as null: the key says
that it was measured, the file stays valid JSON, and a column read by pandas stays numeric.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastgrpo.config import UserError
from fastgrpo.trackers import begin_tracker

PARTS = ("generate", "environment", "reward", "logprobs", "update", "share", "checkpoint", "eval")
"""What a step's time is spent on; `other` is the rest."""


class Ledger:
    """Charges every nanosecond of a run to exactly one part of a step.

    The clock is read once at each border, and the time since the border before goes to the innermost open part, so
    the parts add up to the wall time by construction and an inner part is never counted twice. Nanoseconds are
    integers: the sum is exact, not nearly so. For one thread.

        ledger = Ledger()
        with ledger("update"):
            ...
            with ledger("logprobs"):    # this time is not part of update's
                ...
        ledger.step()                   # {"time/generate_s": 0.0, ..., "time/other_s": ..., "time/total_s": ...}
    """

    def __init__(
        self, *, synchronize: Callable[[], object] | None = None, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        """synchronize is called before each reading of the clock (torch.cuda.synchronize): without it the time of
        queued kernels goes to whoever waits for them. clock returns nanoseconds."""
        self._synchronize = synchronize
        self._clock = clock
        self._open = ["other"]
        self._only: str | None = None
        self._mark: Callable[[str], AbstractContextManager[object]] = nullcontext
        self._ns = dict.fromkeys((*PARTS, "other"), 0)
        self._border = clock()

    @property
    def part(self) -> str:
        """The part that is being charged now."""
        return self._open[-1]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Charge the time inside the block to `part`, less what inner blocks are charged with."""
        if part not in PARTS:
            raise ValueError(f"ledger part {part!r} is none of {', '.join(PARTS)}")
        self._charge()
        self._open.append(self._only or part)
        with self._mark(part if self._only is None else f"{self._only}/{part}"):
            try:
                yield
            finally:
                self._charge()
                self._open.pop()

    @contextmanager
    def all_as(self, part: str) -> Iterator[None]:
        """Charge whatever happens inside to `part`, whichever parts inner blocks name."""
        before, self._only = self._only, part
        try:
            yield
        finally:
            self._only = before

    @contextmanager
    def marking(self, mark: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
        """Meanwhile put `mark(part)` around each part's block, a profiler's named range; eval/generate inside of
        `all_as("eval")`."""
        before, self._mark = self._mark, mark
        try:
            yield
        finally:
            self._mark = before

    def step(self) -> dict[str, float]:
        """Seconds a part since the previous call (or since the ledger was made), and begin the next step."""
        self._charge()
        parts, self._ns = self._ns, dict.fromkeys(self._ns, 0)
        seconds = {f"time/{part}_s": ns / 1e9 for part, ns in parts.items()}
        return {**seconds, "time/total_s": sum(parts.values()) / 1e9}

    def _charge(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        self._ns[self._open[-1]] += now - self._border
        self._border = now


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion, kept for people to read.

    Example: Sample(step=0, kind="eval", prompt_id="eval/3", prompt="17+25=", completion="42", answer="42", reward=1.0)
    """

    step: int
    kind: Literal["train", "eval"]
    prompt_id: str
    prompt: str
    completion: str
    answer: Any
    reward: float
    advantage: float | None = None
    finish_reason: str | None = None
    correct: bool | None = None
    """null: the report calls a reward >= 1 correct, <= 0 incorrect, and anything between neither."""


class MetricsLog:
    """Appends to metrics.jsonl and samples.jsonl in run_dir and passes each step on to the trackers.

    resume_step=None begins a run and refuses a directory that holds one already. resume_step=k goes on after step k:
    lines of later steps are removed, as is a last line that a kill left torn, so that the files end up as an
    uninterrupted run's would; -1 keeps nothing. Write step k's row before its checkpoint becomes visible, or a
    kill between the two loses the row. Rank 0 alone makes one.
    """

    def __init__(
        self,
        run_dir: str | Path,
        trackers: Iterable[str],
        *,
        resume_step: int | None = None,
        run_name: str,
        config: Mapping[str, Any],
        notify: Callable[[str], object] = warnings.warn,
    ) -> None:
        """trackers: as check_trackers takes them. notify is told when a tracker fails during the run, which
        goes on without that tracker; a failure to write the files is an OSError."""
        self.run_dir = Path(run_dir)
        self._notify = notify
        paths = [self.run_dir / "metrics.jsonl", self.run_dir / "samples.jsonl"]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for path in paths:
            if resume_step is not None:
                keep_until(path, resume_step)
            elif path.exists() and path.stat().st_size:
                raise UserError(f"run.dir={run_dir} holds a run already: set resume=auto or another run.dir")
        self._trackers = {
            name: begin_tracker(name, self.run_dir, resume_step, run_name, config) for name in dict.fromkeys(trackers)
        }
        self._metrics, self._samples = (open(path, "ab") for path in paths)  # noqa: SIM115

    def write(self, row: Mapping[str, Any]) -> None:
        """Record one step: `step` and any metrics, as Python, NumPy or torch scalars."""
        step = int(row["step"])
        metrics = {key: _number(value) for key, value in row.items() if key != "step"}
        self._metrics.write(_line({"step": step, **metrics}))
        self._metrics.flush()
        finite = {key: value for key, value in metrics.items() if value is not None}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, finite)
            except Exception as error:  # a server that is away must not end a training run
                del self._trackers[name]
                self._notify(f"{name} failed and gets no more metrics of this run: {error}")

    def write_samples(self, samples: Iterable[Sample]) -> None:
        """Record completions for people to read."""
        for sample in samples:
            record = {**asdict(sample), "reward": _number(sample.reward), "advantage": _number(sample.advantage)}
            if sample.answer is not None:
                record["answer"] = str(sample.answer)  # data may hold dates, NaN, anything
            self._samples.write(_line(record))
        self._samples.flush()

    def close(self) -> None:
        """Close the files and let the trackers send what is left."""
        self._metrics.close()
        self._samples.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self._notify(f"{name} failed at the end of the run: {error}")
        self._trackers = {}

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a write that failed the buffers cannot be flushed either, and the first error is the one to tell.
        with nullcontext() if kind is None else suppress(OSError):
            self.close()


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The whole objects of a JSON-lines file, one after the other; torn or foreign lines are left out."""
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        yield from (record for line in file if (record := _record(line)) is not None)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All that iter_jsonl finds; [] for a missing file."""
    return list(iter_jsonl(path))


def keep_until(path: Path, step: int) -> None:
    """Cut a JSON-lines file behind its last whole record of that step or one before. Steps only grow, so a long run's
    file is read from its end, and no further than that."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as text:
            end = text.rfind(b"\n") + 1
            while end and not _is_until(text[text.rfind(b"\n", 0, end - 1) + 1 : end], step):
                end = text.rfind(b"\n", 0, end - 1) + 1
        file.truncate(end)
        os.fsync(file.fileno())


def _is_until(line: bytes, step: int) -> bool:
    record = _record(line)
    return record is not None and isinstance(record.get("step"), int) and record["step"] <= step


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _line(record: dict[str, Any]) -> bytes:
    # backslashreplace writes a lone surrogate, which UTF-8 cannot hold, as just the escape that JSON has for it.
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _number(value: Any) -> float | int | None:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if not isinstance(value, int | float):
        raise ValueError(f"a metric must be a number, got {value!r}")
    return value
