"""Megatron and vLLM over the same two processes, in layouts that match and that do not."""

import pytest
from ranks_cases import CASES
from setting import ENGINE_BYTES, FLOAT32_TOLERANCE

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SAME_LAYOUT = [case for case in CASES if case.learner_tp == case.sampler_tp and case.learner_pp == case.learner_ep == 1]
OTHERS = [case for case in CASES if case not in SAME_LAYOUT]


@by_name
def test_the_samplers_logprobs_are_the_learners_after_every_update(ranks, case):
    for rank in ranks:
        differences = rank[case.name]["differences"]
        assert len(differences) == 3
        assert rank[case.name]["trained"] == 2
        assert max(differences) <= FLOAT32_TOLERANCE


@by_name
def test_an_engine_holds_no_second_copy_of_what_it_shares(ranks, case):
    """Nor does an update, and what follows it, leave anything; the optimizer has its moments from the start."""
    for rank in ranks:
        assert 0 < rank[case.name]["engine_bytes"] < ENGINE_BYTES
        assert rank[case.name]["bytes_kept"] < 1024


@by_name
def test_ranks_of_an_engine_draw_together(ranks, case):
    expected = [[0, 1, True], [0, 1, False]] if case.sampler_tp == 2 else [[0, 2, True], [1, 2, True]]
    assert [rank[case.name]["sampling_ranks"] for rank in ranks] == expected


@pytest.mark.parametrize("case", SAME_LAYOUT, ids=lambda case: case.name)
def test_matching_layouts_share_every_tensor(ranks, case):
    for rank in ranks:
        found = rank[case.name]
        assert found["copied"] == {}
        assert found["copied_bytes"] == 0
        assert (found["num_local"], found["num_buckets"]) == (0, 0)
        assert found["num_shared"] >= 21  # all of a two-layer model's


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_other_layouts_move_weights_in_buckets_of_bounded_size(ranks, case):
    for rank in ranks:
        found = rank[case.name]
        assert found["copied"] != {}
        assert found["copied_bytes"] > 0
        assert found["num_shared"] > 0  # norms at least
        assert found["num_local"] + found["num_buckets"] > 0
        assert found["largest_bucket"] <= case.bucket_bytes
        assert found["num_buckets"] != 1


@pytest.mark.parametrize("case", [case for case in CASES if case.fail], ids=lambda case: case.name)
def test_all_ranks_rebuild_their_engines_where_one_fails(ranks, case):
    message = "vLLM failed (MemoryError: no blocks left); restarting it, 1 of 1"
    for rank in ranks:
        assert rank[case.name]["messages"] == [message]
        assert rank[case.name]["same_after_restart"]


def test_a_permuted_tensor_on_one_rank_is_named_on_all(ranks):
    (case,) = (case for case in CASES if case.spoil)
    sides = "the checksums of the learner (rank 1) and the sampler (rank 1) differ"
    expected = f"WeightsError: model.layers.1.mlp.down_proj.weight: {sides}"
    for rank in ranks:
        assert rank[case.name]["spoiled"] == f"{expected}; learner and sampler do not hold the same policy"


def test_a_rank_that_fails_alone_ends_the_job_with_its_error(start):
    """The other waits for it inside vLLM, for as long as its process group lets it."""
    line = r"rank 1:\n[\s\S]*EngineError: vLLM failed on rank 1 alone: MemoryError: no blocks left"
    with pytest.raises(AssertionError, match=line):
        start("lonely", num_ranks=2)
