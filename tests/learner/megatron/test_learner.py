"""Every layout computes what the torch learner computes: real processes over gloo, the real Megatron."""

from __future__ import annotations

import pytest
import torch
from oracle import error, in_checkpoint, largest_error
from scenario import CASES, NUM_STEPS, batches_of, model_of

TOLERANCE = 2e-5


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-").replace("=", ""))


each_case = each(CASES)


def is_a_step(got, wanted):
    assert got["policy_version"] == wanted["policy_version"]
    assert not got["skipped"]
    assert got["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=TOLERANCE)
    assert got["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-6)


@each_case
def test_weights_come_back_bit_for_bit(case, jobs, oracle):
    result = jobs(case)
    assert sorted(result["names"]) == sorted(oracle(case.model)["names"])
    assert result["not_exact"] == []


@each_case
def test_weight_slices_are_views_that_cover_every_tensor_once(case, jobs):
    assert jobs(case)["slices"] == []


@each_case
def test_logprobs(case, jobs, oracle):
    assert error(jobs(case)["logprobs"], oracle(case.model)["logprobs"]) <= TOLERANCE


@each_case
def test_the_gradient_of_every_parameter_is_the_global_batchs_whatever_the_layout(case, jobs, oracle):
    worst, name = largest_error(jobs(case)["gradients"], oracle(case.model)["gradients"])
    assert worst <= TOLERANCE, name


@each_case
def test_sharing_prompts_or_not_has_the_same_gradient(case, jobs, oracle):
    """In other micro-batches, which hold 12 prompts where the others hold 5."""
    worst, name = largest_error(jobs(case)["gradients_of_the_other_packing"], oracle(case.model)["gradients"])
    assert worst <= TOLERANCE, name


@each([case for case in CASES if case.data_parallel > 1])
def test_data_parallel_ranks_need_not_have_equally_many_batches_or_any(case, jobs, oracle):
    worst, name = largest_error(jobs(case)["gradients_of_rank_0_alone"], oracle(case.model)["gradients"])
    assert worst <= TOLERANCE, name


@each_case
def test_an_update_without_batches_is_no_step(case, jobs):
    step = jobs(case)["step_without_batches"]
    assert (step["policy_version"], step["loss"], step["grad_norm"], step["skipped"]) == (0, 0.0, 0.0, False)


@each_case
def test_three_steps(case, jobs, oracle):
    actual, expected = jobs(case), oracle(case.model)
    for step in range(NUM_STEPS):
        got, wanted = actual["steps"][step], expected["steps"][step]
        assert got["policy_version"] == step + 1
        is_a_step(got, wanted)
    worst, name = largest_error(actual["weights"], expected["weights"])
    assert worst <= TOLERANCE, name
    start = in_checkpoint(model_of(case.model).state_dict())
    worst, name = largest_error(*({n: w[n] - start[n] for n in w} for w in (actual["weights"], expected["weights"])))
    assert worst <= 1e-3, f"the movement of {name}"  # float32 holds a movement of 1e-3 to about 1e-4 of itself


@each_case
def test_the_moved_reference(case, jobs, oracle):
    assert error(jobs(case)["reference"], oracle(case.model)["reference"]) <= TOLERANCE


@each_case
def test_a_non_finite_loss_on_one_rank_leaves_the_weights_of_all_untouched(case, jobs):
    assert jobs(case)["skipped"] == {"skipped": True, "moved": [], "policy_version": NUM_STEPS}


@each_case
def test_a_saved_state_goes_on_bit_for_bit_with_the_optimizer_offloaded_in_between(case, jobs):
    assert jobs(case)["resume_differs"] == []
    assert jobs(case)["bytes_while_offloaded"] == 0


@each_case
def test_the_weights_stay_at_their_addresses_whatever_happens(case, jobs):
    assert not jobs(case)["moved"]  # by updates, saving, loading and offloading: a sampler works on the same memory


@each_case
def test_all_ranks_return_the_same(case, jobs):
    assert jobs(case)["ranks_differ"] == []


def test_ratios_of_whole_sequences_are_the_same_where_rows_are_cut(results_of):
    whole, cut = results_of(2)["sequence_ratios"]
    worst, name = largest_error(cut, whole)
    assert worst <= TOLERANCE, name
    assert 0 < whole["reported"] < 1


def test_another_model_can_be_the_reference_and_stays_in_its_file(results_of):
    for pair in results_of(2)["other_references"]:
        torch.testing.assert_close(pair["got"], pair["want"], rtol=0, atol=2e-5)
        assert (pair["got"] - pair["own"]).abs().max() > 0.1
        assert "reference" not in pair["saved"]


def test_the_scenario_exercises_what_it_claims(oracle):
    batches = batches_of(True)
    assert len(batches) == 5, "unequally many for two ranks"
    assert sum((batch.segments[:, 3] == batch.segments[:, 2]).sum() for batch in batches) == 5, "a group of 4 is split"
    for model in {case.model for case in CASES}:
        expected = oracle(model)
        metrics = expected["steps"][0]["metrics"]
        assert metrics["clip_fraction/low"] > 0
        assert metrics["clip_fraction/high"] > 0
        assert expected["steps"][0]["grad_norm"] > 0.5, "the gradient must be clipped"
        assert all(gradient.abs().max() > 0 for gradient in expected["gradients"].values())
