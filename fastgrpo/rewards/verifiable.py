"""Rewards that a program can check."""

from __future__ import annotations

MARKER = "#"


def exact_match(completion: str, answer: str) -> float:
    """1 where the text after the last `#` is the answer, white space aside, else 0."""
    _, marker, given = completion.rpartition(MARKER)
    return float(bool(marker) and given.strip() == str(answer).strip())
