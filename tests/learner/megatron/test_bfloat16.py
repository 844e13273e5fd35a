"""A bfloat16 model with float32 masters. bfloat16 holds 3 digits, so results agree with the torch learner's to 1 %."""

import pytest
import torch


def test_it_takes_the_torch_learners_steps(results_of):
    actual, expected = results_of(1)["bfloat16"]["steps"]
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert results_of(1)["bfloat16"]["dtypes"] == {torch.bfloat16}


def test_steps_below_bfloat16s_resolution_add_up(results_of):
    actual, expected = results_of(1)["bfloat16"]["movement"]
    assert expected > 0
    assert actual == pytest.approx(expected, rel=1e-2)


def test_a_saved_state_goes_on_bit_for_bit_with_its_masters(results_of):
    assert results_of(1)["bfloat16"]["goes_on"]
