"""Plain lines align; the live display leaves the terminal as it was, however a run ends."""

import io
import os
import pty
import select
import subprocess
import sys

import pytest

from fastgrpo.console import Console

ROW = {
    "step": 1,
    "reward/mean": 0.2578125,
    "reward/std": 0.4382,
    "kl": 0.0,
    "entropy": 0.4871,
    "response_length/mean": 23.41,
    "tokens_per_second": 12345.6,
    "time/total_s": 2.0,
}

RUN = """
import logging, sys
logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
from fastgrpo.console import Console
with Console("auto", num_steps=3, activity=lambda: "generate") as console:
    console.banner("pty", [("a step", "2 prompts x 4")])
    for step in (1, 2):
        console.step({"step": step, "reward/mean": step / 4, "reward/std": 0.1, "eval/accuracy": step / 8,
                      "kl": 0.01, "tokens_per_second": 900.0, "time/generate_s": 1.0, "time/other_s": 1.0,
                      "time/total_s": 2.0})
    console.message("a notice [not markup]")
    print("printed by a reward")
    logging.info("written by a log handler")
    ENDING
"""


def plain(rows, **kwargs):
    stream = io.StringIO()
    with Console("plain", stream=stream, clock=lambda: 0.0, **kwargs) as console:
        for row in rows:
            console.step(row)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("mode", "connection", "error"),
    [("plain", os.pipe, "[Errno 32] Broken pipe"), ("live", pty.openpty, "[Errno 5] Input/output error")],
)
def test_a_run_goes_on_where_nobody_reads_it_any_more(mode, connection, error, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = connection()
    with os.fdopen(writer, "w") as stream, Console(mode, num_steps=2, stream=stream) as console:
        console.step(ROW)
        os.close(reader)
        console.message("saved")
        console.step(ROW | {"step": 2})
    assert capsys.readouterr().err == f"fastgrpo: no more can be shown here ({error}); the run goes on\n"


def run_on_terminal(ending):
    """What a run writes to a pseudo-terminal, and its exit code."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", RUN.replace("ENDING", ending)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b""
    while select.select([master], [], [], 30)[0]:
        try:
            output += os.read(master, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(master)
    return output.decode(), process.wait(30)


def test_plain_lines_align_and_count_down():
    lines = plain(
        [
            {"step": 0, "eval/accuracy": 0.26171875},
            ROW,
            {**ROW, "step": 2, "eval/accuracy": 0.5, "reward/mean": 1.0, "kl": 0.0123, "tokens_per_second": 830.0},
            {**ROW, "step": 60},
        ],
        num_steps=60,
    )
    assert lines == [
        "step  0/60                       accuracy 0.262",
        "step  1/60  reward  0.258 ±0.44                  kl  0.0000  entropy  0.487  length   23.4   12.3k tok/s"
        "   2.0 s     1:58 left",
        "step  2/60  reward  1.000 ±0.44  accuracy 0.500  kl  0.0123  entropy  0.487  length   23.4     830 tok/s"
        "   2.0 s     1:56 left",
        "step 60/60  reward  0.258 ±0.44                  kl  0.0000  entropy  0.487  length   23.4   12.3k tok/s"
        "   2.0 s",
    ]


def test_plain_lines_survive_what_is_missing_or_not_finite():
    assert plain([{"step": 1}, {"step": 2, "reward/mean": float("nan"), "kl": None}], num_steps=2) == [
        "step 1/2",
        "step 2/2  reward    nan",
    ]


def test_time_left_forgets_the_slow_first_step():
    lines = plain(
        [{**ROW, "step": step, "time/total_s": 100.0 if step == 1 else 60.0} for step in (1, 2)], num_steps=63
    )
    assert lines[0].endswith("1:43:20 left")
    assert lines[1].endswith("1:01:00 left")


def test_banner_and_messages():
    stream = io.StringIO()
    console = Console("plain", num_steps=1, stream=stream)
    console.banner("default", [("a step", "32 prompts × 8 = 256 sequences"), ("", "1 update"), ("to", "runs/x")])
    console.message("resumed after step 3")
    assert stream.getvalue() == (
        "fastgrpo  default\n  a step  32 prompts × 8 = 256 sequences\n          1 update\n  to      runs/x\n"
        "resumed after step 3\n"
    )


def test_nothing_is_shown_when_nothing_is_asked_for():
    stream = io.StringIO()
    with Console("none", num_steps=1, stream=stream) as console:
        console.banner("default", [("a", "b")])
        console.step(ROW)
        console.message("saved")
    assert stream.getvalue() == ""


def test_auto_is_plain_when_piped():
    assert Console("auto", num_steps=1, stream=io.StringIO()).mode == "plain"


def test_an_old_encoding_does_not_stop_a_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console("plain", num_steps=1, stream=stream).step(ROW)
    assert raw.getvalue().startswith(b"step 1/1  reward  0.258 ?0.44")


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("pass", 0),
        ("raise RuntimeError('boom')", 1),
        ("import os; os.kill(os.getpid(), 2); import time; time.sleep(9)", -2),
    ],
)
def test_live_display_gives_the_terminal_back(ending, code):
    output, returned = run_on_terminal(ending)
    assert returned == code, output
    assert "step 2/3" in output
    assert "best" not in output
    for line in ("a notice [not markup]", "printed by a reward", "written by a log handler"):
        # Each stands on a line of its own: the display was wiped before and drawn again below.
        assert line in [text.rsplit("\x1b[2K", 1)[-1].strip() for text in output.split("\r\n")]
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") > 0  # the cursor is shown as often as hidden
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
