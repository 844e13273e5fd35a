"""The report shows what a run recorded, whatever that is, in one file that nothing in it can break out of."""

import json
import re
from html.parser import HTMLParser

import pytest

from fastgrpo.config import UserError
from fastgrpo.metrics import MetricsLog, Sample
from fastgrpo.report import write_report
from fastgrpo.report.charts import Chart, Line, render
from fastgrpo.report.series import duration, make_buckets, merge_rows, percentile, show, smooth, ticks

TIMES = {"time/generate_s": 1.25, "time/update_s": 0.5, "time/other_s": 0.25, "time/total_s": 2.0}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed by its own end tag."""

    VOID = ("meta", "link", "path")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def row(step, **metrics):
    return {
        "step": step,
        "reward/mean": 0.25,
        "kl": 0.001,
        "tokens": 1000,
        "tokens_per_second": 500.0,
        **TIMES,
        **metrics,
    }


def sample(step, kind="eval", prompt_id="eval/0", **changes):
    fields = {"prompt": "12+30=", "completion": "41", "answer": "42", "reward": 0.0, "finish_reason": "stop"}
    return Sample(step=step, kind=kind, prompt_id=prompt_id, **{**fields, **changes})


def report(run_dir, rows=(), samples=(), config=None):
    with MetricsLog(run_dir, [], run_name="test", config={}) as log:
        for metrics in rows:
            log.write(metrics)
        log.write_samples(samples)
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def test_headline_curves_ledger_and_configuration(tmp_path):
    rows = [
        {"step": 0, "eval/accuracy": 0.25, "time/eval_s": 1.0, "time/total_s": 1.0},
        row(1),
        row(2, **{"reward/mean": 0.75, "eval/accuracy": 0.9}),
        row(3, **{"reward/mean": 0.5, "eval/accuracy": 0.875}),
    ]
    config = "train:\n  num_steps: 5\n  learning_rate: 0.0003\nalgorithm:\n  group_size: 8\nseed: 7\n"
    _, page = report(tmp_path, rows, config=config)
    for text in (
        "25.0 % → 87.5 %",
        "best 90.0 % at step 2",
        "0.250 → 0.500",
        "of 5 planned",
        "7.0 s",
        "3000",
        "median 500 tokens/s",
        "KL to the reference",
        "The parts add up to the recorded wall time: 7.000 s of 7.000 s",
        "learning_rate: 0.0003",
    ):
        assert text in page.text
    assert page.tags.count("figure") == 5  # reward, accuracy, KL, throughput, ledger: what was recorded, no more


def test_it_is_one_file_that_needs_no_network(tmp_path):
    html, page = report(tmp_path, [row(1), row(2)], [sample(1)], "seed: 0\n")
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:,"]
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in html
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
    ]


def test_nothing_that_a_run_holds_becomes_markup(tmp_path):
    hostile = "</pre></script><script>alert(1)</script><!-- \" ' &lt; \x00 \udc80 \u2028"
    html, page = report(
        tmp_path,
        [row(1, **{hostile: 0.5}), row(2, **{hostile: 0.75})],
        [sample(1, prompt_id=hostile, prompt=hostile, completion=hostile, answer=hostile)],
        f"key: {json.dumps(hostile)}\n",
    )
    assert page.tags.count("script") == 2  # the data and the page's own
    assert "alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert "\x00" not in html
    assert "␀" in page.text


def test_first_and_last_answers_to_the_same_prompts_stand_side_by_side(tmp_path):
    samples = [
        sample(0, completion="wrong at first"),
        sample(0, prompt_id="eval/1", completion="only at first"),
        sample(5, completion="in between", reward=0.5),
        sample(9, completion="right at last", reward=1.0, finish_reason="length"),
        sample(1, kind="train", prompt_id="train/3", completion="explored", reward=0.5, advantage=-0.25),
    ]
    _, page = report(tmp_path, [row(1)], samples)
    text = page.text
    assert "The first 1 of 1 kept held-out prompts, answered at step 0 and at step 9." in text
    assert text.index("✗ incorrect") < text.index("wrong at first") < text.index("✓ correct") < text.index("right at")
    assert "cut at the length limit" in text
    assert "in between" not in text
    assert "only at first" not in text
    assert "advantage -0.25" in text
    assert text.count("correct") == 2  # a reward of a half is called neither


def test_a_sample_may_say_itself_whether_it_is_correct(tmp_path):
    _, page = report(tmp_path, [row(1)], [sample(1, reward=0.9, correct=True)])
    assert "✓ correct" in page.text


def test_leading_newlines_and_length_of_completions(tmp_path):
    html, page = report(tmp_path, [row(1)], [sample(1, completion="\n\nfirst" + "x" * 5000)])
    assert '<pre dir="auto">\n\n\nfirst' in html  # a browser drops the first newline of a pre
    assert "[… 1007 more characters]" in page.text


@pytest.mark.parametrize("rows", [[], [row(1)], [{"step": 0}], [{"step": 0, "eval/accuracy": 0.5}]])
def test_runs_that_hardly_began(tmp_path, rows):
    _, page = report(tmp_path, rows, config="seed: 0\n")
    assert "seed: 0" in page.text
    assert ("No step is recorded yet." in page.text) == (not rows)


def test_values_that_are_not_finite_leave_a_gap_and_are_named(tmp_path):
    rows = [row(step, loss=float("nan") if step in (2, 3) else 0.5) for step in range(1, 6)]
    html, page = report(tmp_path, rows)
    assert "loss was not finite at 2 steps: 2, 3" in page.text
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert [0.5, None, None, 0.5, 0.5] in [values for chart in data["charts"] for values in chart["values"]]


def test_broken_files_are_read_as_far_as_they_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "kl": "high", "loss": [1], "grad_norm": 1e999, "entropy": true, "tokens": 1' + b"0" * 400 + b"}\n"
        b'{"kl": 1}\n{"step": "x"}\n{"step": 2, "kl": -0.5, "loss": 1e308}\n'
        b'{"step": 2, "time/total_s": 1}\n{"step": 3, "k'
    )
    (tmp_path / "samples.jsonl").write_bytes(
        b'{"step": 1, "kind": "eval"}\n{"kind": "eval"}\n{"step": 2, "kind": 3}\n\xff'
    )
    (tmp_path / "config.yaml").write_text("a: [1\nb: {")
    page = Page(write_report(tmp_path).read_text())
    assert "a: [1" in page.text
    assert "grad_norm was not finite at 1 step: 1" in page.text


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no run: neither metrics.jsonl nor config.yaml is there"):
        write_report(tmp_path)


def test_a_ledger_that_does_not_add_up_is_not_called_exact(tmp_path):
    _, page = report(tmp_path, [row(1, **{"time/total_s": 3.0})])
    assert "The parts add up to 2.000 s but 3.000 s of wall time are recorded: +1.000 s apart." in page.text


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
    rows = [row(step, grad_norm=90.0 if step == 5000 else 1.0 + step % 7 / 10) for step in range(1, 12001)]
    html, page = report(tmp_path, rows)
    assert len(html) < 300_000
    assert "peak of 90.000 at steps 4981–5010 not to scale" in page.text
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert (len(data["first"]), data["first"][0], data["last"][-1]) == (400, 1, 12000)


def test_users_own_metrics_are_drawn_too(tmp_path):
    rows = [row(step, **{"reward/format/mean": 0.5, "eval/pass@4": 0.5, "eval/tokens": 9}) for step in (1, 2)]
    _, page = report(tmp_path, rows)
    assert "2 more metrics" in page.text  # pass@4 stands with the accuracy
    _, many = report(
        tmp_path / "many", [row(step, **{f"eval/pass@{2**k}": 0.5 for k in range(1, 8)}) for step in (1, 2)]
    )
    assert "2 more metrics" in many.text  # seven are more than one chart can tell apart
    assert "pass@4 50.0 %" in page.text
    assert "reward/format/mean" in page.text


def test_rows_of_one_step_are_one_and_their_times_add_up():
    rows = [{"step": 2, "kl": 1.0, "time/total_s": 1.5}, {"step": 1}, {"step": 2, "kl": 2.0, "time/total_s": 0.25}]
    assert merge_rows(rows) == [{"step": 1}, {"step": 2, "kl": 2.0, "time/total_s": 1.75}]


def test_buckets_reduce_what_they_hold():
    buckets = make_buckets([{"step": s, "kl": float(s)} for s in range(5)] + [{"step": 5}], max_buckets=2)
    assert (buckets.first, buckets.last, buckets.x) == ([0, 3], [2, 5], [1.0, 4.0])
    assert (buckets.mean("kl"), buckets.low("kl"), buckets.high("kl")) == ([1.0, 3.5], [0.0, 3.0], [2.0, 4.0])
    assert buckets.mean("loss") == [None, None]


def test_smoothing_ignores_a_spike_and_keeps_a_gap():
    assert smooth([1.0, 1.0, 90.0, 1.0, None, 2.0], 5) == [1.0, 1.0, 1.0, 1.5, None, 1.5]


def test_ticks_are_round_numbers_inside():
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.0, 1.05) == [0.0, 0.5, 1.0]
    assert ticks(-0.5, 61.5, 5) == [0.0, 20.0, 40.0, 60.0]
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0


def test_numbers_for_people():
    assert [show(value, "real") for value in (0.0, 3e-4, 0.0123, 0.5, 12.3456, 123.456, None)] == [
        "0",
        "3e-4",
        "0.0123",
        "0.500",
        "12.346",
        "123.5",
        "–",
    ]
    assert [show(value, "count") for value in (27.25, 950, 5200.4, 12345, 2.5e6)] == [
        "27.2",
        "950",
        "5200",
        "12.3k",
        "2.5M",
    ]
    assert [show(value, "percent") for value in (0.0, 0.0043, 0.25)] == ["0.0 %", "0.43 %", "25.0 %"]
    assert [duration(value) for value in (42.06, 185, 7620, 273600)] == [
        "42.1 s",
        "3 min 05 s",
        "2 h 07 min",
        "3 d 04 h",
    ]


def test_a_line_is_drawn_to_scale():
    buckets = make_buckets([{"step": step} for step in range(4)])
    svg = render(Chart(title="x", lines=[Line(label="a", values=[0.0, 1.0, None, 2.0], color="blue")]), buckets)
    # Steps 0 to 3 stand at 1/8, 3/8, 5/8, 7/8 of 1000; 0 to 2 (and 5 % of air) fill 300 from the bottom.
    assert '<path class="line" style="stroke:var(--blue)" d="M125.0 300.0L375.0 157.1M875.0 14.3"/>' in svg
    assert 'd="M875.0 14.3h0"' in svg  # a point alone is a dot
