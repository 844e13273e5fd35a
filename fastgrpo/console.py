"""What a run shows while it goes: a live display on a terminal, one line a step when piped."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from fastgrpo.metrics import PARTS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

NUM_RECENT = 20
"""Steps whose mean gives the time left and the split of a step's time."""
NUM_SPARK = 24
COLORS = dict(
    zip(
        (*PARTS, "other"),
        ("blue", "bright_green", "magenta", "cyan", "green", "yellow", "red", "bright_blue", "white"),
        strict=True,
    )
)


class Console:
    """A run's display. Use it as a context manager: the terminal is put right again however the block ends.

        with Console("auto", num_steps=60, activity=lambda: ledger.part) as console:
            console.banner("default", [("a step", "32 prompts x 8 = 256 sequences")])
            console.step({"step": 1, "reward/mean": 0.31, ...})     # a row of metrics.jsonl
            console.message("saved step 1")

    On a cluster rank 0 alone shows anything: give the others mode="none".
    """

    def __init__(
        self,
        mode: str = "auto",
        *,
        num_steps: int,
        activity: Callable[[], str] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """mode is run.console; activity names what the run is doing now, for the live display."""
        self._stream = stream or sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (a service may have no stdout)
        self._stderr = sys.stderr
        self.mode = ("live" if _can_draw(self._stream) else "plain") if mode == "auto" else mode
        self._num_steps = num_steps
        self._activity = activity
        self._clock = clock
        self._began = self._stepped = clock()
        # Replaced, never changed in place: the live display's thread reads it at any moment.
        self._rows: tuple[Mapping[str, Any], ...] = ()
        self._accuracies: tuple[tuple[int, float], ...] = ()
        self._columns: set[str] = {"reward"}
        self._live: Any = None
        self._redirected: list[tuple[logging.StreamHandler, TextIO]] = []

    def banner(self, title: str, items: Sequence[tuple[str, str]]) -> None:
        """What the run is about to do, as (label, value) pairs; a label of "" goes on with the one above."""
        width = max((len(label) for label, _ in items), default=0)
        self.message("\n".join([f"fastgrpo  {title}", *(f"  {label:<{width}}  {text}" for label, text in items)]))

    def message(self, text: str) -> None:
        """Show a notice, above the live display where there is one."""
        if self.mode == "none":
            return
        with self._going_on_unseen():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._write(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.jsonl; keys that are missing are left out."""
        self._stepped = self._clock()
        self._rows = (*self._rows, row)[-max(NUM_RECENT, NUM_SPARK) :]
        if row.get("eval/accuracy") is not None:
            self._accuracies = (*self._accuracies, (row["step"], row["eval/accuracy"]))
        with self._going_on_unseen():
            if self._live is not None:
                self._live.refresh()
            elif self.mode != "none":
                self._write(self._plain_line(row))

    def start(self) -> None:
        """Begin the live display; does nothing in the other modes."""
        if self.mode != "live" or self._live is not None:
            return
        from rich.console import Console as RichConsole
        from rich.live import Live

        console = RichConsole(file=self._stream, force_terminal=True)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
        before = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        atexit.register(self.close)
        with self._going_on_unseen():
            self._live.start()
        self._redirect_logging(before)

    def close(self) -> None:
        """End the live display, leaving its last state, and give the terminal back."""
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []
        if self._live is not None:
            try:
                with self._going_on_unseen():
                    self._live.stop()
            finally:
                self._live = None
                atexit.unregister(self.close)

    def __enter__(self) -> Console:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _redirect_logging(self, before: Mapping[int, str]) -> None:
        # rich lifts what is printed above the display, but a log handler made earlier holds the stream itself.
        known = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
        for handler in {handler for logger in known for handler in logger.handlers}:
            if type(handler) is logging.StreamHandler and id(handler.stream) in before:
                self._redirected.append((handler, handler.stream))
                handler.setStream(getattr(sys, before[id(handler.stream)]))

    @contextmanager
    def _going_on_unseen(self) -> Iterator[None]:
        """A terminal that was closed, a pipe whose reader has ended or a log on a full disk must not end a run."""
        try:
            yield
        except OSError as error:
            with suppress(OSError):  # what is buffered has to go somewhere, but a notebook's stream is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            with suppress(OSError):
                print(f"fastgrpo: no more can be shown here ({error}); the run goes on", file=self._stderr)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()

    def _time_left(self) -> float | None:
        times = [row["time/total_s"] for row in self._rows if row.get("time/total_s") and row["step"] > 0]
        if not times or self._rows[-1]["step"] >= self._num_steps:
            return None
        # The first step carries the start of the run.
        recent = times[1:][-NUM_RECENT:] or times
        remaining = (self._num_steps - self._rows[-1]["step"]) * sum(recent) / len(recent)
        return max(0.0, remaining - (self._clock() - self._stepped))

    def _plain_line(self, row: Mapping[str, Any]) -> str:
        width = len(str(self._num_steps))
        cells = [f"step {row['step']:>{width}}/{self._num_steps}"]
        for label, text, size in self._plain_cells(row):
            if text:
                self._columns.add(label)
            if label in self._columns:  # a column stays from its first value on, so that lines align
                cells.append(text.rjust(size) if label in ("rate", "time", "left") else text.ljust(size))
        return "  ".join(cells).rstrip()

    def _plain_cells(self, row: Mapping[str, Any]) -> list[tuple[str, str, int]]:
        reward = _cell(row, "reward/mean", "reward {:6.3f}") + _cell(row, "reward/std", " ±{:.2f}")
        rate, left = row.get("tokens_per_second"), self._time_left()
        return [
            ("reward", reward, 19),
            ("accuracy", _cell(row, "eval/accuracy", "accuracy {:.3f}"), 14),
            ("kl", _cell(row, "kl", "kl {:7.4f}"), 10),
            ("entropy", _cell(row, "entropy", "entropy {:6.3f}"), 14),
            ("length", _cell(row, "response_length/mean", "length {:6.1f}"), 13),
            ("rate", f"{_count(rate)} tok/s" if rate else "", 12),
            ("time", _cell(row, "time/total_s", "{:.1f} s"), 6),
            ("left", f"{_duration(left)} left" if left is not None else "", 12),
        ]

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        width = self._live.console.width if self._live is not None else 80
        rows = self._rows
        lines = [self._progress_line(width)]
        if rows:
            lines += _flow([self._reward_text(), self._accuracy_text()], width)
            lines += _flow(_state_texts(rows[-1]), width)
            lines += _time_texts(rows[-NUM_RECENT:], width)
        return Group(Text(""), *lines)

    def _progress_line(self, width: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step = self._rows[-1]["step"] if self._rows else 0
        left = self._time_left()
        doing = self._activity() if self._activity is not None else "other"
        clock = f"{_duration(self._clock() - self._began)}" + (f", {_duration(left)} left" if left is not None else "")
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self._num_steps, 1), completed=step, width=max(8, min(40, width - 50)))
        grid.add_row(f"step {step}/{self._num_steps}", bar, clock, "" if doing == "other" else f"[dim]{doing} …[/dim]")
        return grid

    def _reward_text(self) -> Text:
        rewards = [x for row in self._rows if (x := row.get("reward/mean")) is not None and math.isfinite(x)]
        row = self._rows[-1]
        text = _cell(row, "reward/mean", "{:.3f}") + _cell(row, "reward/std", " ±{:.2f}")
        return _labelled("reward", text, _spark(rewards))

    def _accuracy_text(self) -> Text:
        if not self._accuracies:
            return _labelled("accuracy", "", "")
        step, last = self._accuracies[-1]
        best = max(accuracy for _, accuracy in self._accuracies)
        text = f"{last:.3f} (step {step}" + (f", best {best:.3f})" if best > last else ")")
        return _labelled("accuracy", text, _spark([accuracy for _, accuracy in self._accuracies]))


def _can_draw(stream: TextIO) -> bool:
    return (
        stream.isatty()
        and os.environ.get("TERM", "") not in ("", "dumb")
        and (stream.encoding or "").lower().replace("-", "") == "utf8"
    )


def _state_texts(row: Mapping[str, Any]) -> list[Text]:
    rate = row.get("tokens_per_second")
    return [
        _labelled("kl", _cell(row, "kl", "{:.4f}")),
        _labelled("entropy", _cell(row, "entropy", "{:.3f}")),
        _labelled("length", _cell(row, "response_length/mean", "{:.1f}")),
        _labelled("truncated", _cell(row, "truncated_fraction", "{:.1%}")),
        _labelled("clipped", _cell(row, "clip_fraction", "{:.2%}")),
        _labelled("grad norm", _cell(row, "grad_norm", "{:.3f}")),
        _labelled("tokens/s", _count(rate) if rate else ""),
    ]


def _time_texts(rows: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    """The recent steps' time as a bar, its parts side by side, and what each is."""
    from rich.text import Text

    seconds = {part: sum(row.get(f"time/{part}_s") or 0.0 for row in rows) for part in COLORS}
    total = sum(seconds.values())
    if total <= 0:
        return []
    num_timed = sum(1 for row in rows if row.get("time/total_s"))
    cells = max(20, min(60, width - 24))
    bar, drawn, reached = Text(), 0, 0.0
    for part, spent in seconds.items():
        reached += spent
        until = round(cells * reached / total)
        bar.append("█" * (until - drawn), style=COLORS[part])
        drawn = until
    bar.append(f"  {total / max(num_timed, 1):.2f} s a step")
    parts = [
        Text.assemble(("■ ", COLORS[part]), f"{part} ", (f"{spent / total:.0%}", "bold"))
        for part, spent in seconds.items()
        if spent / total >= 0.005
    ]
    return [bar, *_flow(parts, width)]


def _labelled(label: str, text: str, spark: str = "") -> Text:
    from rich.text import Text

    if not text:
        return Text()
    return Text.assemble((f"{label} ", "dim"), (text, "bold"), (f"  {spark}" if spark else "", "green"))


def _flow(texts: Sequence[Text], width: int) -> list[Text]:
    """Texts side by side, on as many lines as the width asks for; empty ones are left out."""
    from rich.text import Text

    lines: list[Text] = []
    for text in texts:
        if not text.plain:
            continue
        if lines and len(lines[-1]) + 3 + len(text) <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", text)
        else:
            lines.append(text)
    return lines


def _spark(values: Sequence[float]) -> str:
    values = values[-NUM_SPARK:]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (x - low) / (high - low))] if high > low else "▄" for x in values)


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else form.format(value)


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
