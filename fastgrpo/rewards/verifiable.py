"""Rewards that a program can check. Every one is a plain function of the contract in docs/rewards.md."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from fastgrpo.config import UserError

MARKER = "#"
"""The final answer of generated arithmetic follows it."""

GSM8K_MARKER = "####"
# Commas are sorted out afterwards: a pattern that did would take cubic time on a long list of digits.
_NUMBER = re.compile(r"(?P<sign>-\$?|\$-)?(?P<digits>[0-9](?:[0-9,]*[0-9])?|(?=\.[0-9]))(?P<rest>\.[0-9]+)?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(?P<formula>[^$\n]+)\$|(?P<word>\S+))")
_UNITS = re.compile(r"\\text\s*\{[^{}]*\}|\\(?:%|\$|[,;! ])|[$%\s]")


def exact_match(completion: str, answer: Any) -> float:
    """1 where the text after the last `#` is the answer, white space at its ends aside, else 0."""
    _, marker, given = completion.rpartition(MARKER)
    return float(bool(marker) and given.strip() == str(answer).strip())


def gsm8k(completion: str, answer: Any) -> float:
    """1 where the completion's final number equals the reference, else 0.

    The final number is the one on the line after the last `####`; without that, the content of the last \\boxed{};
    without either, the last number of the text. Dollar and percent signs, thousands separators, trailing periods and
    zeros do not matter: `$1,000.00.` is 1000. Two different numbers after `####` are no answer.
    The reference is a GSM8K solution ending in `#### 72`, or the number alone.
    Raises ValueError for a reference without a number.
    """
    expected = _only_number(str(answer).rpartition(GSM8K_MARKER)[2])
    if expected is None:
        raise ValueError(f"the reference answer {str(answer)[-40:]!r} ends in no number")
    return float(_final_number(completion) == expected)


def math(completion: str, answer: Any) -> float:
    """1 where the content of the completion's last \\boxed{} is mathematically equal to the reference, else 0.

    The reference is a solution with a \\boxed{} answer, or the answer alone. Equality is math-verify's: 1/2 is 0.5 is
    \\frac{1}{2}. Raises UserError where that package is not installed, and ValueError for a reference that it cannot
    read. What it cannot finish (10^{10^{10}}) is ended by reward.timeout_s, and conf/reward/math.yaml counts it as 0.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        raise UserError("the reward `math` needs math-verify: pip install math-verify") from None
    if answer is None:
        raise UserError("the reward `math` compares with an answer, and this row has none; set data.answer_column")
    given, boxed = _boxed(completion), _boxed(str(answer))
    expected = str(answer) if boxed is None else boxed
    if given is None:
        return 0.0
    if "".join(given.split()) == "".join(expected.split()):
        return 1.0
    # Its own limits use signals, which work in main threads only; reward.timeout_s ends a call that hangs.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(f"${expected}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {expected[:60]!r}")
    return float(verify(gold, parse(f"${given}$", parsing_timeout=None), timeout_seconds=None))


def format_tags(completion: str, tags: Sequence[str] = ("think", "answer")) -> float:
    """1 where the completion is exactly <think>...</think> <answer>...</answer> (or `tags`), each tag once, else 0."""
    pattern = r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    once = all(completion.count(mark) == 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>"))
    return float(once and re.fullmatch(rf"\s*{pattern}\s*", completion, re.DOTALL) is not None)


def regex(completion: str, pattern: str) -> float:
    """1 where the pattern matches the whole completion (a dot matches line ends too), else 0."""
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)


def brevity(completion: str, token_ids: list[int], max_tokens: int) -> float:
    """Falls evenly from 1 for no tokens to 0 for max_tokens and beyond. Give it a small weight."""
    return max(0.0, 1.0 - len(token_ids) / max_tokens)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} (or \\fbox{...}) with balanced braces, or None."""
    *_, box = None, *_BOX.finditer(text)
    if box is None:
        return None
    depth = 1
    for position in range(box.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[box.end() : position]
    return None


def _boxed(text: str) -> str | None:
    """What last_boxed finds or, where no box has braces, TeX's other form: \\boxed 5 and $\\boxed \\frac12$."""
    if _BOX.search(text):
        return last_boxed(text)
    *_, bare = None, *_BARE_BOX.finditer(text)
    return bare and (bare["formula"] or bare["word"]).strip()


def _final_number(completion: str) -> Decimal | None:
    _, marker, given = completion.rpartition(GSM8K_MARKER)
    if marker:
        return _only_number(given.strip().partition("\n")[0])
    boxed = last_boxed(completion)
    if boxed is not None:
        bare = _UNITS.sub("", boxed.replace("{,}", ",")).rstrip(".")
        return _numbers(bare)[0] if _NUMBER.fullmatch(bare) else None
    numbers = _numbers(completion)
    return numbers[-1] if numbers else None


def _only_number(text: str) -> Decimal | None:
    numbers = set(_numbers(text))
    return numbers.pop() if len(numbers) == 1 else None


def _numbers(text: str) -> list[Decimal]:
    text = text.replace("\N{MINUS SIGN}", "-")
    numbers = []
    for match in _NUMBER.finditer(text):
        parts = match["digits"].split(",")
        if _THOUSANDS.fullmatch(match["digits"]):
            parts = ["".join(parts)]
        values = [Decimal(part or "0") for part in parts if part or match["rest"]]
        if match["rest"]:
            values[-1] = Decimal((parts[-1] or "0") + match["rest"])
        if match["sign"] and _is_minus(text[max(0, match.start() - 20) : match.start()]):
            values[0] = values[0].copy_negate()
        numbers.extend(values)
    return numbers


def _is_minus(before: str) -> bool:
    """Whether a dash after this text is a sign, and no subtraction (5 - 3, 5-3) and no hyphen (top-3)."""
    subtracted = before.rstrip()[-1:].isdigit() or before.rstrip()[-1:] in (*")]%",)
    joined = before[-1:].isalnum() or before[-1:] in (*"-_.",)
    return not (subtracted or joined)
