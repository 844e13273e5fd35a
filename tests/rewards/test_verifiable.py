"""Rewards that a program can check, on literal texts and on GSM8K itself."""

import json
import sys
import time
from pathlib import Path

import pytest

from fastgrpo.config import RewardConfig, UserError
from fastgrpo.data import ALPHABET, arithmetic
from fastgrpo.rewards import Rewards, verifiable
from fastgrpo.rewards.verifiable import brevity, exact_match, format_tags, gsm8k, last_boxed, math, regex

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7+5=12;#632", 1),
        ("#632", 1),
        ("# 632 \n", 1),
        ("#1#632", 1),
        ("632", 0),
        ("#632#1", 0),
        ("#0632", 0),
        ("#632;", 0),
        ("#", 0),
        ("", 0),
    ],
)
def test_exact_match(completion, reward):
    assert exact_match(completion, "632") == reward
    assert exact_match(completion, 632) == reward


def test_generated_solutions_are_exact_matches():
    assert verifiable.MARKER == arithmetic.MARKER
    assert verifiable.MARKER in ALPHABET
    for problem in (arithmetic.Problem(347, 285, "+"), arithmetic.Problem(500, 499, "-")):
        assert exact_match(problem.solution, problem.answer) == 1


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so 9*8 = 72\n#### 72", "x\n#### 72", 1),
        ("#### 72", "72", 1),
        ("#### $72.00.", "72", 1),
        ("#### 72.50", "72.5", 1),
        ("#### 72.5", "72", 0),
        ("#### 1,450,000", "1450000", 1),
        ("#### 1450000 dollars", "#### 1,450,000", 1),
        ("#### 20%", "20", 1),
        ("#### -3", "-3", 1),
        ("#### \N{MINUS SIGN}3", "-3", 1),
        ("#### -$3", "-3", 1),
        ("#### 3", "-3", 0),
        ("#### 72\nLet me check: 9*8 is 72, not 71", "72", 1),
        ("#### 71\n#### 72", "72", 1),
        ("#### 72\n#### 71", "72", 0),
        ("#### 71 or 72", "72", 0),
        ("#### 72 (that is 72)", "72", 1),
        ("#### 3/4", "3", 0),
        ("#### ", "72", 0),
        ("72 ####", "72", 0),
        (r"thus \boxed{72}", "72", 1),
        (r"\boxed{71} no, \boxed{\$72\text{ dollars}}.", "72", 1),
        (r"\boxed{1{,}450}", "1450", 1),
        (r"\boxed{-5\%}", "-5", 1),
        (r"\boxed{\frac{7}{2}} 72", "72", 0),
        (r"\boxed{71} or 72", "72", 0),
        ("She has 3 and 69, which makes 72.", "72", 1),
        ("It is $1,000.", "1000", 1),
        ("75-3=72", "72", 1),
        ("the answer is 75 - 3", "-3", 0),
        ("the answer is 75 - 3", "3", 1),
        ("the answer is -3.", "-3", 1),
        ("It is .5", "0.5", 1),
        ("1, 2, 72", "72", 1),
        ("1,2,72", "72", 1),
        ("no number", "72", 0),
        ("", "0", 0),
        ("12345678901234567890123456789012", "12345678901234567890123456789012", 1),
        ("-12345678901234567890123456789012", "-12345678901234567890123456789013", 0),
    ],
)
def test_gsm8k(completion, answer, reward):
    assert gsm8k(completion, answer) == reward


def test_gsm8k_refuses_a_reference_without_a_number():
    with pytest.raises(ValueError, match="the reference answer 'many' ends in no number"):
        gsm8k("#### 72", "many")


@pytest.mark.parametrize("completion", ["1,000," * 20000 + "0000", "-" * 100000, "9," * 50000, "\\boxed{" * 20000])
def test_gsm8k_takes_no_time_over_long_nonsense(completion):
    started = time.monotonic()
    assert gsm8k(completion, "72") == 0
    assert time.monotonic() - started < 2


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_gsm8k_on_the_real_rows():
    rows = [json.loads(line) for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").open()]
    assert len(rows) == 8792
    for row in rows:
        number = row["answer"].rpartition("####")[2].strip()
        assert gsm8k(row["answer"], row["answer"]) == 1
        assert gsm8k(f"The total is \\boxed{{{number}}}.", row["answer"]) == 1
        assert gsm8k(f"Therefore it is ${number}.", row["answer"]) == 1
        assert gsm8k(f"#### {number}1", row["answer"]) == 0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {5} is not \boxedx{6}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 5", None),
        (r"\boxed{1", None),
        ("1", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_math_ends_the_run_by_name_without_its_package(monkeypatch, prompt):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    config = RewardConfig(path="fastgrpo.rewards.verifiable:math", num_workers=0, on_error="zero")
    with (
        Rewards(config) as rewards,
        pytest.raises(UserError, match=r"completion 0: the reward `math` needs math-verify: pip install math-verify$"),
    ):
        rewards.check(prompt())


@pytest.mark.parametrize(
    ("given", "answer", "reward"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("0.5", r"thus \boxed{\frac{1}{2}}", 1),
        (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}", 1),
        ("(x+1)^2", "x^2+2x+1", 1),
        ("(x+1)^2", "x^2+1", 0),
        ("3", "4", 0),
        ("", "4", 0),
        (r"\frac{", "4", 0),
        (r"\text{Evelyn}", r"it is \boxed{\text{Evelyn}}", 1),
        ("x + 1", "x+1", 1),
    ],
)
def test_math_equality(given, answer, reward):
    pytest.importorskip("math_verify")
    assert math(f"first \\boxed{{9}}, finally \\boxed{{{given}}}", answer) == reward


@pytest.mark.parametrize(
    ("solution", "reward"),
    [
        (r"From 3 and 4 follows $\boxed \frac12$.", 1),
        (r"From 3 and 4 follows $\boxed\frac12$ and no more.", 1),
        (r"From 3 and 4 follows $\fbox{\frac{1}{2}}$.", 1),
        (r"From 3 and 4 follows \boxed 0.5 and no more", 1),
        (r"From 3 and 4 follows $\boxed {1}$, not $\boxed 0.5$.", 0),
    ],
)
def test_math_reads_the_boxes_of_published_solutions(solution, reward):
    pytest.importorskip("math_verify")
    assert math(r"\boxed{0.5}", solution) == reward
    assert math(solution, "0.5") == reward


def test_math_refuses_a_row_without_a_reference():
    pytest.importorskip("math_verify")
    with pytest.raises(UserError, match="compares with an answer, and this row has none"):
        math(r"\boxed{5}", None)


def test_math_wants_the_answer_boxed():
    pytest.importorskip("math_verify")
    assert math("so x+1", "x+1") == 0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think> <answer>c</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think><answer>c</answer> and more", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0),
        ("<think>a<answer>c</answer></think>", 0),
        ("c", 0),
    ],
)
def test_format_tags(completion, reward):
    assert format_tags(completion) == reward


def test_format_tags_of_other_names():
    assert format_tags("<a.b>1</a.b>", tags=["a.b"]) == 1
    assert format_tags("<axb>1</axb>", tags=["a.b"]) == 0


def test_regex_matches_the_whole_completion():
    assert regex("a\nb", r"a.b") == 1
    assert regex("a\nb, c", r"a.b") == 0


def test_brevity():
    assert [brevity("", token_ids=[0] * n, max_tokens=4) for n in (0, 1, 4, 9)] == [1, 0.75, 0, 0]
