"""Reward functions that tests name by path."""

import time

from fastgrpo.rewards import StepRewards


def varied(completion):
    """A random policy's completions of one prompt differ in it."""
    return (sum(map(ord, completion)) % 10) / 10


def one(completion):
    return 1.0


def varied_if_odd(completion, answer):
    return varied(completion) if int(answer) % 2 else 0.25


def raises_if_even(completion, answer):
    if int(answer) % 2 == 0:
        raise RuntimeError("no luck with even answers")
    return varied(completion)


def hangs_on(completion, answer, which):
    """Hangs on the problem with this answer."""
    if int(answer) == which:
        time.sleep(60)
    return varied(completion)


def first_and_last_token(completion, token_ids):
    """A step that ends with the first token, and one that ends with the last."""
    return StepRewards(steps=[(0, token_ids[0] / 100), (len(token_ids) - 1, len(token_ids) / 10)])


def text(completion):
    return "good"


def not_a_number(completion):
    return float("nan")


def too_few(completions):
    return [1.0]


def needs_a_colour(completion, colour):
    return 1.0
