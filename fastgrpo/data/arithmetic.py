"""Generated arithmetic with worked solutions: a task that a tiny model learns from nothing.

A problem reads `347+285=`. Its solution works column by column from the least significant digit. Every column
but the first names the carry that it takes over, and every column ends in two digits: the carry it hands on and
the digit of the answer. The answer follows the marker:

    347+285=    7+5=12;4+8+1=13;3+2+1=06;#632
    632-285=    2-5=17;3-8-1=14;6-2-1=03;#347      (2-5 borrows: 12-5 is 7, and 1 is borrowed from the next column)

So every token follows from at most three others, and columns stand at the same places in all problems of a size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.rows import Row

MARKER = "#"
"""The final answer follows it."""
ALPHABET = "0123456789+-=;" + MARKER
"""Every character that a prompt or a solution can hold."""
SIGNS = {"addition": "+", "subtraction": "-"}


@dataclass(frozen=True)
class Problem:
    """left (+|-) right, with left >= right for subtraction. Example: Problem(left=347, right=285, sign="+")."""

    left: int
    right: int
    sign: str

    @property
    def text(self) -> str:
        """What the model is asked: "347+285="."""
        return f"{self.left}{self.sign}{self.right}="

    @property
    def answer(self) -> str:
        """The final number: "632"."""
        return str(self.left + self.right if self.sign == "+" else self.left - self.right)

    @property
    def solution(self) -> str:
        """The worked columns and the answer: "7+5=12;4+8+1=13;3+2+1=06;#632"."""
        lefts, rights = str(self.left)[::-1], str(self.right)[::-1]
        columns, carry = [], 0
        for place, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            taken = f"{self.sign}{carry}" if place else ""
            signed = 1 if self.sign == "+" else -1
            total = int(left) + signed * (int(right) + carry)
            carry, digit = abs(total // 10), total % 10
            columns.append(f"{left}{self.sign}{right}{taken}={carry}{digit}")
        return ";".join(columns) + f";{MARKER}{self.answer}"


def generate_rows(config: DataConfig, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Draws the training and the held-out problems as rows with columns prompt, answer and solution.

    The held-out problems depend on operation and num_digits alone, so every seed is measured on the same ones; the
    training problems depend on the seed too. No problem occurs twice in either, and none in both; a+b and b+a are
    one problem. Raises UserError for an unknown operation or more problems than there are.
    """
    _check(config)
    name = f"{config.operation}/{config.num_digits}"
    seen: set[tuple[int, int]] = set()
    held_out = _draw(config, random.Random(f"eval/{name}"), seen, config.eval_size)
    training = _draw(config, random.Random(f"train/{name}/{seed}"), seen, config.num_problems)
    return _rows(training), _rows(held_out)


def _check(config: DataConfig) -> None:
    if config.operation not in SIGNS:
        raise UserError(f"data.operation={config.operation} is unknown; use addition or subtraction")
    if config.num_digits < 1:
        raise UserError(f"data.num_digits={config.num_digits} must be at least 1")
    if config.num_problems < 1:
        raise UserError(f"data.num_problems={config.num_problems} must be at least 1")
    operands = _num_operands(config.num_digits)
    distinct = operands * (operands + 1) // 2
    if config.num_problems + config.eval_size > distinct:
        raise UserError(
            f"data.num_problems={config.num_problems} and data.eval_size={config.eval_size} ask for more than the "
            f"{distinct} different {config.num_digits}-digit problems; lower them or raise data.num_digits"
        )


def _num_operands(num_digits: int) -> int:
    return 10 if num_digits == 1 else 9 * 10 ** (num_digits - 1)


def _draw(config: DataConfig, rng: random.Random, seen: set[tuple[int, int]], count: int) -> list[Problem]:
    smallest = 0 if config.num_digits == 1 else 10 ** (config.num_digits - 1)
    draw_operand: Callable[[], int] = lambda: smallest + rng.randrange(_num_operands(config.num_digits))  # noqa: E731
    problems: list[Problem] = []
    while len(problems) < count:
        left, right = draw_operand(), draw_operand()
        key = (max(left, right), min(left, right))
        if key in seen:
            continue
        seen.add(key)
        if config.operation == "subtraction":
            left, right = key
        problems.append(Problem(left, right, SIGNS[config.operation]))
    return problems


def _rows(problems: list[Problem]) -> list[Row]:
    return [
        Row(index=i, place=f"problem {i}", values={"prompt": p.text, "answer": p.answer, "solution": p.solution})
        for i, p in enumerate(problems)
    ]
