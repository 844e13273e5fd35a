"""A torch learner and the real vLLM in one process."""

import pytest
from setting import ENGINE_BYTES, FLOAT32_TOLERANCE, MODELS, NUM_SAMPLES, SAMPLING

MOVED = "model.layers.1.mlp.down_proj.weight: the sampler of rank 0 has moved it to other memory"
SAME = "; learner and sampler do not hold the same policy"


of_every_model = pytest.mark.parametrize("kind", MODELS)


@of_every_model
def test_vllm_computes_with_the_learners_own_tensors(alone, kind):
    found = alone[kind]
    assert found["copied"] == {}
    assert found["same_addresses"]


@of_every_model
def test_no_matrix_is_allocated_at_any_time(alone, kind):
    assert alone[kind]["matrices_allocated"] == 0


@of_every_model
def test_an_engine_holds_no_second_copy_of_the_weights(alone, kind):
    """Nor does an update, and what follows it, leave more than the optimizer's moments and its counts of steps."""
    assert alone[kind]["copied_bytes"] == 0
    assert 0 < alone[kind]["engine_bytes"] < ENGINE_BYTES
    assert 0 <= alone[kind]["bytes_kept"] < 4096


@of_every_model
def test_an_update_is_visible_to_the_sampler_with_nothing_copied(alone, kind):
    assert len(alone[kind]["differences"]) == 4
    assert max(alone[kind]["differences"]) <= FLOAT32_TOLERANCE
    assert alone[kind]["change"] > 0.1  # or the test would pass with the weights of then


@of_every_model
def test_an_engine_leaves_the_process_as_it_was(alone, kind):
    assert alone[kind]["process_untouched"] == [True] * 4


def test_samples_depend_on_the_seed_and_the_prompt_alone(alone):
    found = alone["sampling"]
    assert found["drawn"] == found["again"] == found["reversed"]
    assert found["alone"] == {"train/2": found["drawn"]["train/2"]}
    assert found["other_seed"] != found["drawn"]
    assert found["no_prompts"] == []
    ended = [(name, i, ids) for name, completions in found["drawn"].items() for i, ids in enumerate(completions)]
    assert sorted(map(list, found["ended"])) == sorted(map(list, ended))


def test_prompts_wait_where_one_step_cannot_take_them_all(alone):
    assert alone["crowded"] == 64


def test_a_conversation_goes_on_from_the_keys_of_its_turns(alone):
    found = alone["continuing"]
    after, anew, of_new_weights = found["cached"]
    assert after > 0
    assert anew == of_new_weights == 0
    assert found["same"]
    assert max(found["errors"]) <= FLOAT32_TOLERANCE


def test_every_prompt_has_its_own_limit(alone):
    for lengths in alone["continuing"]["lengths"]:
        assert all(length <= limit for length, limit in zip(lengths, (1, 5, 9, 12, 12), strict=True))
        assert lengths[0] == 1
        assert max(lengths) > 9


def test_siblings_differ(alone):
    for completions in alone["sampling"]["drawn"].values():
        assert len({tuple(tokens) for tokens in completions}) == NUM_SAMPLES


@pytest.mark.parametrize("params", ["warm", "cut", "greedy"])
def test_logprobs_are_those_of_transformers(alone, params):
    assert alone["sampling"][params] <= FLOAT32_TOLERANCE


def test_greedy_takes_the_likeliest_token(alone):
    assert alone["sampling"]["greedy_gap"] == 0


def test_a_stop_token_ends_a_completion_and_belongs_to_it(alone):
    reasons = set()
    for reason, is_stop in alone["sampling"]["stopped"]:
        reasons.add(reason)
        assert not any(is_stop[:4])  # min_new_tokens
        assert not any(is_stop[:-1])
        assert is_stop[-1] == (reason == "stop")
        assert reason == "stop" or len(is_stop) == SAMPLING.max_new_tokens
    assert reasons == {"stop", "length"}


def test_the_proof_passes_on_what_is_shared(alone):
    assert alone["proofs"]["intact"] == alone["proofs"]["mended"] == "agree"


def test_the_proof_names_a_stale_tensor(alone):
    assert alone["proofs"]["stale"] == f"WeightsError: {MOVED}{SAME}"


def test_the_canary_finds_a_permutation_that_addresses_cannot_show(alone):
    assert alone["proofs"]["permuted"].startswith("WeightsError: the canary's logprobs differ by ")


def test_memory_that_does_not_fit_is_copied_and_says_why(alone):
    reason = "the learner's model.layers.{}.mlp.up_proj.weight is not where the fused parameter has it"
    name = "model.layers.{}.mlp.gate_up_proj.weight"
    assert alone["apart"]["copied"] == {name.format(i): reason.format(i) for i in range(2)}
    assert alone["apart"]["copied_bytes"] == 2 * 192 * 128 * 4
    offered = 2 * 96 * 128 * 4  # the job's own copies of the learner's gate_proj
    assert alone["apart"]["engine_bytes"] == alone["llama"]["engine_bytes"] + offered  # nothing escapes the count
    assert alone["apart"]["matrices_allocated"] == 2
    assert max(alone["apart"]["differences"]) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("what", ["stale", "permuted"])
def test_a_checksum_names_a_copy_that_is_not_the_learners(alone, what):
    sides = "the checksums of the learner (rank 0) and the sampler (rank 0) differ"
    assert alone["apart"][what] == f"WeightsError: model.layers.0.mlp.gate_proj.weight: {sides}{SAME}"


def test_a_rebuilt_engine_gets_its_copies_again(alone):
    assert alone["apart"]["restored"] == "agree"


@pytest.mark.parametrize("which", ["adapters", "some adapters"])
def test_vllm_computes_adapters_beside_the_learners_matrices(alone, which):
    found = alone[which]
    assert len(found["differences"]) == 4
    assert max(found["differences"]) <= FLOAT32_TOLERANCE
    assert found["change"] > 0.1
    assert found["restored"] == "agree"
    assert found["compiled_error"] == 0


def test_only_adapters_are_ever_copied_and_a_stale_one_is_named(alone):
    """The A's of a layer's q, k and v are one matrix to vLLM, and gate's and up's."""
    parts = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    assert set(alone["adapters"]["copied"]) == {f"model.layers.{i}.{part}.lora.A" for i in range(2) for part in parts}
    sides = "the checksums of the learner (rank 0) and the sampler (rank 0) differ"
    expected = f"WeightsError: model.layers.0.self_attn.q_proj.lora_A.weight: {sides}{SAME}"
    assert alone["adapters"]["stale"] == expected
    assert alone["some adapters"]["copied"] == {}
    assert alone["some adapters"]["stale"] == "agree"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "MemoryError: no blocks left"),
        ("drops", "EngineError: 24 of 24 requests were dropped"),
        ("stands_still", "EngineError: 24 of 24 requests never end"),
    ],
)
def test_a_failed_engine_is_rebuilt_and_the_rollout_drawn_again(alone, how, message):
    assert alone["failures"][how] == f"vLLM failed ({message}); restarting it, 1 of 1"
    assert alone["failures"]["nothing"] == ""


def test_a_broken_engine_is_gone_before_the_next_is_built(alone):
    assert alone["failures"]["gone"] == {"engine": True, "kv_cache": True}


def test_sleeping_memory_is_freed_after_the_engine_and_what_frees_it_stays(alone):
    assert alone["pools"] == ["shut down", "pool freed"]


def test_torchs_allocator_is_left_as_the_user_asked(alone):
    assert alone["allocator_settings"] == ["expandable_segments:True"]


def test_compiled_code_is_found_again_by_the_next_engine_of_a_model_alone(alone):
    first, again = alone["failures"]["keys"]
    assert first == again != alone["qwen2-tied"]["key"]


def test_a_gpus_engine_is_asked_for_what_the_learner_leaves(alone):
    found = alone["gpu_arguments"]
    assert found["head"] == {"head_dtype": "float32"}
    assert found["tokens"] == 16384  # of a step; no fewer than sequences
    # A KV cache, or three quarters in all, of a GPU of four times the weights; 0.32 takes these off by itself.
    assert found["shares"] == [0.5, 0.75]
    assert found["older_shares"] == [0.25, 0.5]


def test_a_rebuilt_engine_adopts_the_learners_tensors_again(alone):
    assert alone["failures"]["proof"] == "agree"
    assert alone["failures"]["copied"] == {}


def test_an_engine_that_keeps_failing_stops_the_run_by_name(alone):
    expected = "EngineError: vLLM failed 2 times in a row (sampler.max_restarts=1): MemoryError: no blocks left"
    assert alone["failures"]["twice"] == expected


def test_a_backend_that_writes_its_own_form_over_the_learners_weights_is_refused(alone):
    refusal = "vLLM repacks .weight, which fastgrpo cannot share"
    assert alone["repacking"] == {"nowhere": None, "elsewhere": refusal, "in place": refusal}
