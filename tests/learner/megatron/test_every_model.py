"""Every family of models, tied and untied, in every basic layout: conversion, logprobs, gradients and three steps."""

from __future__ import annotations

import pytest
from oracle import error, largest_error
from scenario import DENSE, EVERY_MODEL, EXPERTS
from test_learner import TOLERANCE, is_a_step

PAIRS = [
    (processes, str(layout), model)
    for processes, layouts in EVERY_MODEL.items()
    for layout, models in layouts.items()
    for model in models
]


@pytest.mark.parametrize(("processes", "layout", "model"), PAIRS)
def test_it_is_the_torch_learners(processes, layout, model, results_of, oracle):
    actual, expected = results_of(processes)["every_model"][f"{model} {layout}"], oracle(model)
    assert sorted(actual["names"]) == sorted(expected["names"])
    assert actual["not_exact"] == []
    assert error(actual["logprobs"], expected["logprobs"]) <= TOLERANCE
    for packing in ("gradients", "gradients_of_the_other_packing"):
        worst, name = largest_error(actual[packing], expected["gradients"])
        assert worst <= TOLERANCE, (packing, name)
    assert len(actual["steps"]) == len(expected["steps"]) == 3
    for got, wanted in zip(actual["steps"], expected["steps"], strict=True):
        is_a_step(got, wanted)
    worst, name = largest_error(actual["weights"], expected["weights"])
    assert worst <= TOLERANCE, name


def test_no_model_is_left_out():
    assert {model for _, _, model in PAIRS} == {*DENSE, *EXPERTS}
    assert len(PAIRS) == 52
