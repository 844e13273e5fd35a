"""A state saved by one layout goes on in every other, with either optimizer."""

import pytest
import torch
from oracle import largest_error
from scenario import NUM_STEPS, RESHARDED, RESHARDED_EXPERTS

CHAINS = {"reshard": RESHARDED, "reshard_experts": RESHARDED_EXPERTS}
LATER = [(chain, index) for chain, cases in CHAINS.items() for index in range(1, len(cases))]


@pytest.mark.parametrize(
    ("chain", "index"), LATER, ids=[CHAINS[chain][index].name.replace(" ", "-") for chain, index in LATER]
)
def test_the_next_step_is_the_same_in_every_layout(chain, index, results_of):
    first, other = (results_of(4)[chain][i] for i in (0, index))
    assert other["step"]["policy_version"] == NUM_STEPS
    assert other["step"]["loss"] == pytest.approx(first["step"]["loss"], rel=5e-6)
    worst, name = largest_error(other["weights"], first["weights"])
    assert worst <= 1e-6, name
    assert (other["reference"] - first["reference"]).abs().max() <= 1e-5


@pytest.mark.parametrize("chain", CHAINS)
def test_a_state_that_went_through_all_layouts_goes_on_bit_for_bit_in_its_own(chain, results_of):
    first, again = results_of(4)[chain][0], results_of(4)[chain][-1]
    assert CHAINS[chain][0] == CHAINS[chain][-1]
    assert again["step"] == first["step"]
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in first["weights"].items())
    assert torch.equal(again["reference"], first["reference"])


def test_what_follows_the_beginning_of_a_save_is_not_saved(results_of):
    assert results_of(2)["pending_save"] == []


def test_what_is_missing_from_a_checkpoint_is_named(results_of):
    assert results_of(1)["odd_checkpoints"] == {
        "before any step": 0,
        "one too many": 0,
        "lacking": "resume=DIRECTORY: saved without a reference model; resume with algorithm.kl_coef=0, or "
        "with the algorithm.reference.path of then",
        "none": "resume=DIRECTORY: no state of a Megatron learner there",
        "reads": [2],  # of each tensor by two learners, also by the one with a reference
        "processes": 0,  # left by a save: a signal to the rank's group would end them before the next
    }
