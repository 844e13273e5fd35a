"""The loop with a tiny model: what a step does under each setting, and what it writes down."""

import gc
import json
import math
import re
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from builders import make_groups, save_tiny_model, small_run
from runs import assembled, rows_of, without_clock

from fastgrpo import commands
from fastgrpo.config import UserError
from fastgrpo.data import packing
from fastgrpo.evaluate import accuracies
from fastgrpo.help import group_choices
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.main import compose
from fastgrpo.metrics import read_jsonl
from fastgrpo.minibatch import Minibatch, add_logprobs, make_minibatch
from fastgrpo.models import hf
from fastgrpo.ranks import Ranks
from fastgrpo.rollout import collect
from fastgrpo.samplers import make_sampler
from fastgrpo.signals import StopRequest
from fastgrpo.trainer import compute_advantages, train

OBJECTIVES = Path(__file__).with_name("example_objectives.py")
PARTS = ("generate", "environment", "reward", "logprobs", "update", "share", "checkpoint", "eval", "other")


def updates_of(run):
    """Let the run's learner note every (batches, result)."""
    seen, update = [], run.learner.update

    def noting(batches, objective):
        seen.append((list(batches), update(batches, objective)))
        return seen[-1][1]

    run.learner.update = noting
    return seen


def policy_of(run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.learner.model.parameters()]


def equal(these, those) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


SURROGATES = {
    "grpo": Objective(kl_coef=0.04),
    "dapo": Objective(clip_ratio_high=0.28),
    "dr_grpo": Objective(),
    "gspo": Objective(ratio_level="sequence", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "cispo": Objective(surrogate="cispo", clip_ratio_low=1.0, clip_ratio_high=0.28),
    "sapo": Objective(surrogate="sapo"),
    "rloo": Objective(surrogate="reinforce"),
}


@pytest.mark.parametrize("algorithm", group_choices()["algorithm"])
def test_every_algorithm_learns_from_two_steps(algorithm, workplace, tiny_qwen2):
    with assembled(*small_run(tiny_qwen2, f"algorithm={algorithm}")) as run:
        before, seen = policy_of(run), updates_of(run)
        train(run, StopRequest(print))
        assert run.task.objective == SURROGATES[algorithm]
        assert (run.learner.reference is None) == (run.task.objective.kl_coef == 0)
        assert [result.policy_version for _, result in seen] == [1, 2]
        assert all(batch.old_logprobs is None for batches, _ in seen for batch in batches)  # on-policy
        assert not equal(before, policy_of(run))
    first, second = read_jsonl("run/metrics.jsonl")[1:]
    for row in (first, second):
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
        assert row["grad_norm"] > 0
        assert row["ratio/mean"] == 1.0
        assert row["updates/skipped"] == 0
    assert ("kl" in first) == (run.task.objective.kl_coef > 0)


def test_functions_of_ones_own_stand_for_the_built_in_ones(workplace, tiny_qwen2):
    """The surrogate brings its own KL term, so that only it asks for the reference."""
    overrides = small_run(tiny_qwen2, "train.updates_per_rollout=2", "train.learning_rate=0.01", "data.shuffle=false")
    ours = rows_of(*overrides, "run.dir=ours")
    paths = [f"algorithm.surrogate={OBJECTIVES}:clip", f"algorithm.advantage={OBJECTIVES}:standardised"]
    theirs = rows_of(*overrides, *paths, "algorithm.kl_coef=0", "algorithm.surrogate_kwargs.kl_coef=0.04")
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        for key in ("loss", "grad_norm", "kl", "reward/mean", "ratio/mean", "entropy"):
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-7), key
        assert other["surrogate/clipped"] == pytest.approx(mine["clip_fraction"])
        assert mine["clip_fraction"] > 0
        assert "clip_fraction" not in other


def test_a_surrogate_is_not_given_renormalised_probabilities(workplace, tiny_qwen2):
    (workplace / "mine.py").write_text("def f(ratio, sampler_logprobs): return ratio * sampler_logprobs")
    message = "^algorithm.surrogate=mine.py:f asks for `sampler_logprobs`, which top_p, top_k or min_new_tokens"
    with (
        pytest.raises(UserError, match=message),
        assembled(*small_run(tiny_qwen2, "algorithm.surrogate=mine.py:f", "sampling.top_p=0.9")),
    ):
        pass


@pytest.mark.parametrize("setting", ["path=nowhere", "schedule=ema"])
def test_a_reference_that_no_surrogate_asks_for_is_refused(setting, workplace, tiny_qwen2):
    overrides = [f"algorithm.surrogate={OBJECTIVES}:writes", "algorithm.kl_coef=0", f"algorithm.reference.{setting}"]
    with (
        pytest.raises(UserError, match=f"^algorithm.reference.{setting}: nothing asks for a reference"),
        assembled(*small_run(tiny_qwen2, *overrides)),
    ):
        pass


def test_only_the_most_undecided_tokens_learn_the_advantage(workplace, tiny_qwen2):
    """A quarter of each update's, over all of its micro-batches; the old logprobs are of the same pass."""
    more = ["algorithm.top_entropy_quantile=0.25", "learner.max_tokens_per_microbatch=40", "train.num_minibatches=2"]
    with assembled(*small_run(tiny_qwen2, *more, "train.num_steps=1")) as run:
        passes, look = [], run.learner.logprobs_and_entropies

        def noting(batches, *, temperature):
            passes.append((batches, *look(batches, temperature=temperature)))
            return passes[-1][1:]

        run.learner.logprobs_and_entropies = noting
        seen = updates_of(run)
        train(run, StopRequest(print))
    assert len(passes) == len(seen) == 2
    thresholds = []
    for (before, logprobs, entropies), (batches, _) in zip(passes, seen, strict=True):
        assert len(batches) > 1
        assert equal(logprobs, [batch.old_logprobs for batch in batches])
        entropy = torch.cat(entropies)
        kept = math.ceil(len(entropy) / 4)
        thresholds.append(entropy.sort(descending=True).values[kept - 1].item())
        advantages = torch.cat([batch.advantages for batch in before])
        learned = torch.cat([batch.advantages for batch in batches])
        assert torch.equal(learned, torch.where(entropy >= thresholds[-1], advantages, 0.0))
        assert 0 < (learned != 0).sum() <= kept < (advantages != 0).sum()
    row = read_jsonl("run/metrics.jsonl")[1]
    assert row["entropy/threshold"] == pytest.approx(statistics.mean(thresholds))


def test_the_sampler_draws_from_the_newest_weights(workplace, tiny_qwen2):
    """A second step's rollouts carry the version that the first made, and the learner finds their very logprobs."""
    with assembled(*small_run(tiny_qwen2, "train.learning_rate=0.01")) as run:
        versions, generate = [], run.sampler.generate

        def noting(*args):
            groups = generate(*args)
            versions.append({rollout.policy_version for group in groups for rollout in group.rollouts})
            return groups

        run.sampler.generate = noting
        train(run, StopRequest(print))
    assert versions == [{0}, {0}, {1}, {2}]  # evaluation, two steps, evaluation
    for row in read_jsonl("run/metrics.jsonl")[1:]:
        assert row["sampler_mismatch/max_abs"] < 1e-4


@pytest.mark.parametrize("more", [(), ("sampler.oversample=0.5", "sampler.round_tokens=2")], ids=["whole", "rounds"])
def test_completions_are_scored_while_others_are_drawn(workplace, tiny_qwen2, more, monkeypatch):
    """All are begun before the last draw ends, or the round after the one that they ended in; and none twice."""
    monkeypatch.setattr("fastgrpo.rollout.PACE_S", 0.0)
    with assembled(*small_run(tiny_qwen2, *more)) as run:
        events, submitted = [], []
        generate, begin, submit = run.sampler.generate, run.task.rewards.begin, run.task.rewards._executor.submit

        def generating(*args):
            groups = generate(*args)
            events.append("drawn")
            return groups

        def beginning(prompt, rollout, *rest):
            events.append(rollout.conversation_id)
            begin(prompt, rollout, *rest)

        def submitting(index, calls):
            submitted.append(calls)
            return submit(index, calls)

        run.sampler.generate, run.task.rewards.begin = generating, beginning
        run.task.rewards._executor.submit = submitting
        for run.step in (1, 2):
            groups, _ = collect(run)
            assert [g.rewards.shape for g in groups] == [(4,)] * 4
    begun = [event for event in events if event != "drawn"]
    assert len(set(begun)) == len(begun) == len(submitted) >= 2 * 16
    before = events.index("drawn") if not more else len(events) - 1 - events[::-1].index("drawn")
    assert sum(event != "drawn" for event in events[:before]) >= 16


def test_two_passes_over_two_minibatches_take_four_updates_on_old_logprobs(workplace, tiny_qwen2):
    more = ["train.updates_per_rollout=2", "train.num_minibatches=2", "train.num_steps=1", "train.learning_rate=0.01"]
    with assembled(*small_run(tiny_qwen2, *more)) as run:
        before = policy_of(run)
        expected, logprobs_of = [], run.learner.logprobs_of

        def noting(batches, *, temperature, reference=False):
            result = logprobs_of(batches, temperature=temperature, reference=reference)
            if not reference:
                assert equal(before, policy_of(run))  # computed before anything has moved
                expected.extend(result)
            return result

        run.learner.logprobs_of = noting
        seen = updates_of(run)
        train(run, StopRequest(print))
    assert [result.policy_version for _, result in seen] == [1, 2, 3, 4]
    assert [len(batches) for batches, _ in seen] == [1, 1, 1, 1]
    olds = [batches[0].old_logprobs for batches, _ in seen]
    assert equal(olds, [*expected, *expected])
    assert seen[0][1].metrics["ratio/mean"] == 1.0
    assert seen[0][1].metrics["kl/old"] == 0.0
    assert all(result.metrics["ratio/mean"] != 1.0 for _, result in seen[1:])
    row = read_jsonl("run/metrics.jsonl")[-1]
    assert row["policy_version"] == 4
    assert row["grad_norm"] == pytest.approx(statistics.mean(result.grad_norm for _, result in seen))


def test_each_minibatch_holds_its_share_of_the_groups(workplace, tiny_qwen2):
    """And its weights are a mean over its own sequences, not over the step's."""
    with assembled(*small_run(tiny_qwen2, "train.num_minibatches=2", "train.num_steps=1")) as run:
        seen = updates_of(run)
        train(run, StopRequest(print))
    for batches, _ in seen:
        assert sum(len(batch.sequence_ids) for batch in batches) == 8
        assert sum(batch.token_weights.sum().item() for batch in batches) == pytest.approx(1.0)


def reference_after_steps(run) -> tuple[list, list]:
    """(first reference parameter, first policy parameter) at the start and after each step."""

    def pair():
        return [next(model.parameters()).detach().clone() for model in (run.learner.reference, run.learner.model)]

    pairs, write = [pair()], run.log.write

    def noting(row):
        if row["step"]:
            pairs.append(pair())
        write(row)

    run.log.write = noting
    train(run, StopRequest(print))
    references, policies = zip(*pairs, strict=True)
    return list(references), list(policies)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_can_be_another_model(rank, workplace, tiny_qwen2, tmp_path):
    """Of another architecture; it is neither moved nor saved, and a resumed run reads it again."""
    path = save_tiny_model(tmp_path / "teacher", "llama", num_hidden_layers=3)
    overrides = small_run(tiny_qwen2, f"algorithm.reference.path={path}", f"model.lora.rank={rank}")
    with assembled(*overrides) as run:
        seen = updates_of(run)
        train(run, StopRequest(print))
    teacher = hf.load_model(path, device="cpu", dtype=torch.float32)
    for batches, _ in seen:
        expected = TorchLearner(teacher, run.config.train, num_updates=1).logprobs_of(batches, temperature=1.0)
        assert equal(expected, [batch.ref_logprobs for batch in batches])
    assert read_jsonl("run/metrics.jsonl")[1]["kl"] > 1e-3
    assert torch.load("run/checkpoints/step-000002/learner/learner.pt")["reference"] is None
    with assembled(*overrides, "resume=auto", "train.num_steps=3") as run:
        assert equal(teacher.parameters(), run.learner.reference.parameters())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", ('"vocab_size": 258', '"vocab_size": 99'), "it has 99 tokens, and the policy's go up to 257"),
        (
            "config.json",
            ('"max_position_embeddings": 128', '"max_position_embeddings": 9'),
            "its context is of 9 tokens, and a prompt and its completion can have",
        ),
        (
            "tokenizer.json",
            ('"a": ', '"other": '),
            "the policy's token 'a' is number .*, and there it is missing; give",
        ),
    ],
)
def test_a_reference_that_cannot_read_the_tokens_is_refused(file, change, message, workplace, tiny_qwen2, tmp_path):
    path = save_tiny_model(tmp_path / "teacher")
    text = (tmp_path / "teacher" / file).read_text()
    assert change[0] in text
    (tmp_path / "teacher" / file).write_text(text.replace(*change))
    with (
        pytest.raises(UserError, match=f"^algorithm.reference.path={path}: {message}"),
        assembled(*small_run(tiny_qwen2, f"algorithm.reference.path={path}")),
    ):
        pass


@pytest.mark.parametrize("schedule", ["fixed", "refresh", "ema"])
def test_the_reference_follows_its_schedule(schedule, workplace, tiny_qwen2):
    more = [f"algorithm.reference.schedule={schedule}", "algorithm.reference.refresh_every=2", "train.num_steps=4"]
    with assembled(*small_run(tiny_qwen2, *more, "algorithm.reference.ema_decay=0.75", "eval.every=0")) as run:
        references, policies = reference_after_steps(run)
    assert torch.equal(references[0], policies[0])
    assert all(not torch.equal(a, b) for a, b in pairwise(policies))
    if schedule == "ema":
        for step in range(1, 5):
            moved = 0.75 * references[step - 1] + 0.25 * policies[step]
            torch.testing.assert_close(references[step], moved, atol=1e-7, rtol=1e-6)
        return
    sources = {"fixed": [0, 0, 0, 0, 0], "refresh": [0, 0, 2, 2, 4]}[schedule]
    assert equal(references, [policies[source] for source in sources])


def test_the_kl_of_a_refreshed_reference_starts_again_from_nothing(workplace, tiny_qwen2):
    more = ["algorithm.reference.schedule=refresh", "algorithm.reference.refresh_every=2", "train.num_steps=3"]
    kl = [row["kl"] for row in rows_of(*small_run(tiny_qwen2, *more, "train.learning_rate=0.01"))[1:]]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert kl[1] > 1e-4
    assert kl[2] == pytest.approx(0.0, abs=1e-9)


def test_dynamic_sampling_replaces_constant_groups_and_counts_them(workplace, tiny_qwen2):
    more = ["algorithm.dynamic_sampling=true", "algorithm.max_resamples=20", "train.num_steps=3"]
    with assembled(*small_run(tiny_qwen2, *more, reward="varied_if_odd")) as run:
        seen, scored, score = updates_of(run), [], run.task.rewards.score

        def noting(groups, decode):
            result = score(groups, decode)
            scored.extend(result.groups)
            return result

        train(run, StopRequest(print))
        taken = run.stream.state_dict()["position"]
        run.task.rewards.score = noting
    rows = read_jsonl("run/metrics.jsonl")[1:]
    assert [row["groups/used"] for row in rows] == [4, 4, 4]
    assert sum(row["groups/sampled"] for row in rows) == taken > 12
    for batches, _ in seen:
        numbers = torch.cat([batch.sequence_ids for batch in batches]) // 4
        advantages = torch.cat(
            [part[:1] for batch in batches for part in batch.advantages.split(batch.cu_scored.diff().tolist())]
        )
        assert all(bool((advantages[numbers == group] != 0).any()) for group in range(4))
    for row in rows:
        constant = row["groups/sampled"] * row["groups/constant_fraction"]
        assert constant >= row["groups/sampled"] - row["groups/used"]
    text = [sample for sample in read_jsonl("run/samples.jsonl") if sample["kind"] == "train"]
    assert all(int(sample["answer"]) % 2 for sample in text)


def test_dynamic_sampling_gives_up_after_max_resamples(workplace, tiny_qwen2):
    more = ["algorithm.dynamic_sampling=true", "algorithm.max_resamples=2"]
    with assembled(*small_run(tiny_qwen2, *more, reward="one")) as run:
        before = policy_of(run)
        train(run, StopRequest(print))
        assert equal(before, policy_of(run))
    for row in read_jsonl("run/metrics.jsonl")[1:]:
        assert (row["groups/sampled"], row["groups/used"], row["groups/constant_fraction"]) == (12, 0, 1.0)


def test_constant_groups_have_exactly_no_gradient(workplace, tiny_qwen2):
    with assembled(*small_run(tiny_qwen2, "algorithm.kl_coef=0", reward="one")) as run:
        before, seen = policy_of(run), updates_of(run)
        train(run, StopRequest(print))
        assert equal(before, policy_of(run))
    assert [(result.loss, result.grad_norm) for _, result in seen] == [(0.0, 0.0), (0.0, 0.0)]
    assert read_jsonl("run/metrics.jsonl")[1]["groups/constant_fraction"] == 1.0


def rewarded(lengths, rewards, reasons=None):
    """One group of completions of these lengths and rewards."""
    (scored,) = make_groups([(3, lengths)])
    rollouts = scored.group.rollouts
    if reasons:
        rollouts = tuple(replace(r, finish_reason=reason) for r, reason in zip(rollouts, reasons, strict=True))
    return replace(
        scored, group=replace(scored.group, rollouts=rollouts), rewards=torch.tensor(rewards), advantages=None
    )


def test_overlong_completions_lose_reward_evenly_over_the_buffer(workplace, tiny_qwen2):
    """Buffer 2 of 6 tokens, penalty 0.5: nothing up to 4, 0.25 at 5, 0.5 at 6."""
    more = ["algorithm.overlong_buffer=2", "algorithm.overlong_penalty=0.5", "algorithm.advantage=mean"]
    with assembled(*small_run(tiny_qwen2, *more)) as run:
        (group,) = compute_advantages(run, [rewarded([1, 4, 5, 6], [1.0, 1.0, 1.0, 1.0])])
    assert group.rewards.tolist() == [1.0, 1.0, 0.75, 0.5]
    assert group.advantages.tolist() == [0.1875, 0.1875, -0.0625, -0.3125]


def test_truncated_completions_stay_in_the_baseline_but_carry_no_loss(workplace, tiny_qwen2):
    groups = [rewarded([2, 3, 6], [1.0, 0.0, -1.0], ["stop", "stop", "length"])]
    for mask, kept in ((False, [0, 1, 2]), (True, [0, 1])):
        more = [f"algorithm.mask_truncated={mask}", "algorithm.advantage=mean", f"run.dir=run-{mask}"]
        with assembled(*small_run(tiny_qwen2, *more)) as run:
            (batch,) = make_minibatch(run, compute_advantages(run, groups)).batches
        assert batch.sequence_ids.tolist() == kept
        first = batch.cu_scored[:-1]
        assert batch.advantages[first].tolist() == [1.0, 0.0, -1.0][: len(kept)]  # less the mean over all three
        # A masked sequence still counts: 1 / (3 sequences * its tokens).
        torch.testing.assert_close(batch.token_weights[first], 1 / (3 * batch.cu_scored.diff().float()))


def test_microbatches_are_dealt_by_their_work(workplace, tiny_qwen2, monkeypatch):
    """Equally many tokens each, but a long completion's attention is more work than that of four short ones. A rank
    makes the tensors of its own, for all of them are a large job's whole step."""
    packed, pack = [], packing.Layout.pack
    monkeypatch.setattr(packing.Layout, "pack", lambda layout: packed.append(layout) or pack(layout))
    long, short = rewarded([41], [1.0]), rewarded([11] * 4, [1.0, 0.0, 1.0, 0.0])
    size = len(long.group.prompt.token_ids) + 40
    with assembled(*small_run(tiny_qwen2, f"learner.max_tokens_per_microbatch={size}")) as run:
        groups = compute_advantages(run, [long, short, long, short])
        shares = []
        for data_rank in range(2):
            run.learner.ranks = Ranks(data_rank=data_rank, num_data_ranks=2)
            shares.append(make_minibatch(run, groups))
    assert [[batch.num_tokens for batch in share.batches] for share in shares] == [[size] * 2] * 2
    assert [sorted(len(batch.sequence_ids) for batch in share.batches) for share in shares] == [[1, 4]] * 2
    assert len(packed) == sum(len(share.batches) for share in shares)
    assert shares[0].flops == shares[1].flops == sum(run.flops(batch) for share in shares for batch in share.batches)


def test_a_step_of_nothing_but_masked_completions_updates_nothing(workplace, tiny_qwen2):
    more = ["algorithm.mask_truncated=true", "sampling.stop_token_ids=[]"]
    with assembled(*small_run(tiny_qwen2, *more)) as run:
        before = policy_of(run)
        train(run, StopRequest(print))
        assert equal(before, policy_of(run))
    assert read_jsonl("run/metrics.jsonl")[1]["truncated_fraction"] == 1.0


def test_what_is_offloaded_has_gone_before_the_sampler_takes_its_memory(workplace, tiny_qwen2, monkeypatch):
    seen = []

    def make(config, learner, *rest):
        seen.append(sum(tensor.untyped_storage().nbytes() for tensor in learner.optimizer.state()))
        return make_sampler(config, learner, *rest)

    monkeypatch.setattr("fastgrpo.assemble.make_sampler", make)
    rows_of(*small_run(tiny_qwen2, "cluster.dtype=bfloat16", "learner.offload=always", "train.num_steps=1"))
    assert seen == [0]


@pytest.mark.parametrize(("kind", "offload"), [("torch", "never"), ("megatron", "auto")])
def test_an_evaluation_moves_out_an_optimizer_that_is_there(kind, offload, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(config, *_, **__):
        raise StoppedError(config.learner.offload)

    monkeypatch.setattr("fastgrpo.assemble.assemble", stop)
    with pytest.raises(StoppedError, match=offload):
        commands.evaluate(compose("eval", [f"learner={kind}"])[0])


IMPORTANCE = {  # old - sampler is 0.25 at every token; two and five tokens; capped at 3
    "token": [math.exp(0.25)] * 7,
    "sequence": [math.exp(0.5)] * 2 + [3.0] * 5,
}


@pytest.mark.parametrize("level", IMPORTANCE)
def test_importance_weights_are_of_a_token_or_of_its_sequence(level, workplace, tiny_qwen2):
    more = [f"algorithm.importance_level={level}", "algorithm.importance_cap=3"]
    with assembled(*small_run(tiny_qwen2, *more)) as run:
        (batch,) = make_minibatch(run, compute_advantages(run, [rewarded([2, 5], [1.0, 0.0])])).batches
        policy = run.learner.logprobs(batch, temperature=1.0)
        batch = replace(batch, sampler_logprobs=policy - 0.25)
        (batch,) = add_logprobs(run, Minibatch(batches=[batch], flops=0.0)).batches
    assert torch.equal(batch.old_logprobs, policy)
    torch.testing.assert_close(batch.importance_weights, torch.tensor(IMPORTANCE[level]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", IMPORTANCE)
def test_importance_weights_of_the_own_sampler_are_one(level, workplace, tiny_qwen2):
    with assembled(*small_run(tiny_qwen2, f"algorithm.importance_level={level}", "train.num_steps=1")) as run:
        seen = updates_of(run)
        train(run, StopRequest(print))
    for batch in seen[0][0]:
        torch.testing.assert_close(batch.importance_weights, torch.ones_like(batch.targets, dtype=torch.float32))


def test_renormalised_probabilities_are_not_compared(workplace, tiny_qwen2):
    row = rows_of(*small_run(tiny_qwen2, "sampling.top_p=0.9", "train.num_steps=1", "eval.every=0"))[-1]
    assert "kl" in row
    assert not any(name.startswith("sampler_mismatch/") for name in row)


def test_temperature_divides_the_learners_logits_too(workplace, tiny_qwen2):
    row = rows_of(*small_run(tiny_qwen2, "sampling.temperature=0.5", "train.num_steps=1", "eval.every=0"))[-1]
    assert row["sampler_mismatch/max_abs"] < 1e-4
    assert row["kl"] == pytest.approx(0.0, abs=1e-9)


def test_process_supervision_gives_a_token_the_rewards_of_the_steps_ahead(workplace, tiny_qwen2):
    """Steps normalised over all of the group's, then summed from each token on (arXiv 2402.03300, section 4.1.3)."""
    more = ["algorithm.advantage=process", "train.num_steps=1", "train.prompts_per_step=1", "eval.every=0"]
    with assembled(*small_run(tiny_qwen2, *more, reward="first_and_last_token")) as run:
        seen = updates_of(run)
        train(run, StopRequest(print))
    (batch,) = seen[0][0]
    completions = batch.targets.split(batch.cu_scored.diff().tolist())
    steps = [(tokens[0].item() / 100, len(tokens) / 10) for tokens in completions]
    values = [value for pair in steps for value in pair]
    mean, std = statistics.mean(values), statistics.stdev(values)
    for advantages, (first, last) in zip(batch.advantages.split(batch.cu_scored.diff().tolist()), steps, strict=True):
        ahead = (last - mean) / std
        expected = torch.tensor([ahead] * len(advantages))
        expected[0] += (first - mean) / std
        torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-4)
    assert read_jsonl("run/metrics.jsonl")[-1]["reward/mean"] == pytest.approx(sum(values) / 4)


def test_process_supervision_without_steps_is_refused(workplace, tiny_qwen2):
    with pytest.raises(UserError, match=r"algorithm\.advantage=process: the reward function returned no step rewards"):
        rows_of(*small_run(tiny_qwen2, "algorithm.advantage=process"))


ONE_STEP = ("train.num_steps=1", "train.prompts_per_step=8", "data.shuffle=false", "data.num_problems=8")


def problems(run) -> list[int]:
    return [int(prompt.answer) for prompt in run.stream._prompts]


def test_a_reward_that_raises_ends_the_run_under_fail(workplace, tiny_qwen2):
    with pytest.raises(UserError) as error:
        rows_of(*small_run(tiny_qwen2, *ONE_STEP, reward="raises_if_even"))
    assert "raised RuntimeError: no luck with even answers (example_rewards.py line " in str(error.value)
    assert str(error.value).endswith("; mend the function or set reward.on_error=zero or drop")


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_a_reward_that_raises_is_counted(policy, workplace, tiny_qwen2):
    overrides = small_run(tiny_qwen2, *ONE_STEP, f"reward.on_error={policy}", reward="raises_if_even")
    with assembled(*overrides) as run:
        even = sum(answer % 2 == 0 for answer in problems(run))
        even_eval = sum(int(prompt.answer) % 2 == 0 for prompt in run.task.prompts.eval)
        train(run, StopRequest(print))
    assert 0 < even < 8
    assert 0 < even_eval < 4
    start, row = read_jsonl("run/metrics.jsonl")
    assert row["reward/error_count"] == 4 * even  # a call a completion
    assert row["reward/timeout_count"] == 0
    assert row["reward/dropped_groups"] == (even if policy == "drop" else 0)
    assert row["groups/used"] == (8 - even if policy == "drop" else 8)
    assert row["groups/constant_fraction"] == (0 if policy == "drop" else even / 8)
    assert start["eval/error_count"] == even_eval
    assert start.get("eval/dropped_groups", 0) == (even_eval if policy == "drop" else 0)


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_a_reward_that_hangs_is_ended_and_counted(policy, workplace, tiny_qwen2):
    overrides = small_run(tiny_qwen2, *ONE_STEP, "eval.every=0", "algorithm.group_size=2", reward="hangs_on")
    more = ["reward.num_workers=1", "reward.timeout_s=1", f"reward.on_error={policy}"]
    with assembled(*overrides, *more, "reward.kwargs.which=-1") as run:
        which = problems(run)[-1]
    with assembled(*overrides, *more, f"reward.kwargs.which={which}") as run:
        train(run, StopRequest(print))
    row = read_jsonl("run/metrics.jsonl")[-1]
    assert (row["reward/timeout_count"], row["reward/error_count"]) == (2, 0)
    assert row["reward/dropped_groups"] == (policy == "drop")
    assert row["groups/used"] == (7 if policy == "drop" else 8)
    assert row["time/reward_s"] >= 2.0


def test_an_evaluation_whose_every_reward_fails_says_only_that(workplace, tiny_qwen2):
    overrides = small_run(tiny_qwen2, "reward.on_error=drop", "train.num_steps=1", reward="raises_if_even")
    with assembled(*overrides, "eval.num_prompts=1") as run:
        run.task.prompts.eval[0] = replace(run.task.prompts.eval[0], answer="2")
        train(run, StopRequest(print))
    start = read_jsonl("run/metrics.jsonl")[0]
    assert {key: value for key, value in start.items() if key.startswith("eval/")} == {
        "eval/error_count": 1,
        "eval/dropped_groups": 1,
    }


def spoil_gradients(run, steps) -> None:
    """Make the advantages of these steps infinite, as an overflowing reward model would."""
    update = run.learner.update

    def spoilt(batches, objective):
        if run.step in steps:
            batches = [replace(b, advantages=torch.full_like(b.advantages, float("inf"))) for b in batches]
        return update(batches, objective)

    run.learner.update = spoilt


def test_nonfinite_gradients_skip_their_updates_and_are_counted(workplace, tiny_qwen2, capsys):
    overrides = small_run(tiny_qwen2, "train.num_steps=5", "train.max_nonfinite_updates=3", "eval.every=0")
    with assembled(*overrides, "run.console=plain") as run:
        spoil_gradients(run, {1, 2, 4, 5})  # never three in a row
        train(run, StopRequest(print))
        assert run.num_nonfinite == 2
    rows = read_jsonl("run/metrics.jsonl")[1:]
    assert [row["updates/skipped"] for row in rows] == [1, 1, 0, 1, 1]
    assert [row["policy_version"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[0]["grad_norm"] is None


def test_too_many_nonfinite_gradients_stop_the_run_and_save_the_batch(workplace, tiny_qwen2):
    overrides = small_run(tiny_qwen2, "train.num_steps=5", "train.max_nonfinite_updates=2", "checkpoint.every=1")
    with assembled(*overrides) as run:
        spoil_gradients(run, {2, 3})
        with pytest.raises(UserError) as error:
            train(run, StopRequest(print))
        before = policy_of(run)
    assert str(error.value) == (
        "step 3: 2 updates in a row had a non-finite loss or gradient (train.max_nonfinite_updates=2); the last batch "
        "is in run/nonfinite-step-000003.pt; lower train.learning_rate, then go on with resume=auto"
    )
    (batch,) = torch.load("run/nonfinite-step-000003.pt", weights_only=True)
    assert batch["token_ids"].numel() > 16
    assert batch["old_logprobs"] is None
    assert [row["step"] for row in read_jsonl("run/metrics.jsonl")] == [0, 1, 2]
    with assembled(*overrides, "resume=auto") as run:
        assert (run.step, run.num_nonfinite) == (2, 1)
        assert equal(before, policy_of(run))


FIXED_KEYS = {
    "step",
    "reward/mean",
    "reward/std",
    "kl",
    "entropy",
    "clip_fraction",
    "grad_norm",
    "loss",
    "learning_rate",
    "policy_version",
    "response_length/mean",
    "truncated_fraction",
    "groups/used",
    "updates/skipped",
    "reward/error_count",
    "reward/timeout_count",
    "tokens",
    "tokens_per_second",
    "tflop",
    "tflop_per_second",
    "time/total_s",
    *(f"time/{part}_s" for part in PARTS),
}


def test_every_row_has_the_documented_keys_and_times_that_add_up(workplace, tiny_qwen2):
    rows = rows_of(*small_run(tiny_qwen2, "train.num_steps=3", "checkpoint.every=2", "run.trackers=[tensorboard]"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert len({frozenset(key for key in row if not key.startswith("eval/")) for row in rows[1:]}) == 1
    for row in rows[1:]:
        assert set(row) >= FIXED_KEYS
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["time/total_s"])
        assert row["tflop_per_second"] == pytest.approx(row["tflop"] / row["time/update_s"])
        assert "mfu" not in row  # nobody knows what this CPU could do
    for row in rows:
        assert sum(row[f"time/{part}_s"] for part in PARTS) == pytest.approx(row["time/total_s"], rel=1e-9)
        assert ("eval/accuracy" in row) == (row["step"] in (0, 2, 3))
        assert (row["time/checkpoint_s"] > 1e-3) == (row["step"] in (2, 3))
    assert all(row["time/generate_s"] > 0 and row["time/update_s"] > 0 for row in rows[1:])


def test_metrics_md_names_every_metric(workplace, tmp_path):
    documented = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    more = ["sampler.oversample=0.5", "sampler.round_tokens=2", "algorithm.importance_level=token"]
    more += [
        "algorithm.top_entropy_quantile=0.5",
        "eval.num_samples=4",
        "eval.temperature=1",
        "reward.extra.x.path=fastgrpo.rewards.verifiable:exact_match",
    ]
    rows = rows_of(
        *small_run(
            save_tiny_model(tmp_path / "moe", "qwen3_moe"), "learner.router_replay=true", "train.num_steps=3", *more
        )
    )
    for key in {key for row in rows for key in row} - {"step", "reward/x", "reward/varied"}:
        general = re.sub(r"^memory/[a-z]+", "memory/<phase>", re.sub(r"^time/(?!total)[a-z]+", "time/<part>", key))
        assert f"`{general}`" in documented, key


def test_tokens_count_the_prompt_once_for_every_completion(workplace, tiny_qwen2):
    row = rows_of(*small_run(tiny_qwen2, "train.num_steps=1", "sampling.stop_token_ids=[]"))[-1]
    assert row["tokens"] == 4 * 4 * (len("123+456=") + 6)
    assert row["response_length/min"] == row["response_length/max"] == 6


def test_a_seed_repeats_the_run_and_another_does_not(workplace, tiny_qwen2):
    shared = ["algorithm.kl_coef=0.1", "train.updates_per_rollout=2"]
    runs = {
        name: without_clock(rows_of(*small_run(tiny_qwen2, *shared, f"run.dir={name}", f"seed={seed}")))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    }
    assert runs["first"] == runs["again"]
    assert runs["first"] != runs["other"]
    assert Path("first/samples.jsonl").read_bytes() == Path("again/samples.jsonl").read_bytes()


def test_each_value_of_a_column_has_an_accuracy_of_its_own(workplace, tiny_qwen2):
    right = torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    assert accuracies(right, ["grade school", "math", "grade school"]) == {
        "eval/accuracy/grade_school": 0.25,
        "eval/accuracy/math": 1.0,
    }
    with pytest.raises(
        UserError, match=r"eval.by=level: eval/\d+ has no such column; further ones are prompt, solution$"
    ):
        rows_of(*small_run(tiny_qwen2, "eval.by=level"))


def test_evaluation_is_on_time_and_of_the_held_out_questions(workplace, tiny_qwen2):
    more = [
        "eval.by=solution",
        "train.num_steps=5",
        "eval.every=2",
        "eval.num_prompts=3",
        "eval.num_samples=4",
        "eval.temperature=1",
    ]
    rows = rows_of(*small_run(tiny_qwen2, *more, reward="one"))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4, 5]
    assert rows[0]["eval/accuracy"] == rows[0]["eval/pass@4"] == rows[0]["eval/reward"] == 1.0
    assert sum(key.startswith("eval/accuracy/") for key in rows[0]) == 3
    samples = read_jsonl("run/samples.jsonl")
    shown = {(s["step"], s["prompt_id"]) for s in samples if s["kind"] == "eval"}
    assert shown == {(step, f"eval/{i}") for step in (0, 2, 4, 5) for i in range(3)}
    trained = {s["prompt"] for s in samples if s["kind"] == "train"}
    assert not trained & {s["prompt"] for s in samples if s["kind"] == "eval"}


def test_several_rewards_are_weighed_and_reported_one_by_one(workplace, tiny_qwen2):
    extra = ["path=fastgrpo.rewards.verifiable:brevity", "weight=0.5", "kwargs.max_tokens=12"]
    more = ["reward.weight=2", *(f"reward.extra.short.{setting}" for setting in extra)]
    more += ["train.num_steps=1", "sampling.stop_token_ids=[]"]
    row = rows_of(*small_run(tiny_qwen2, *more, reward="one"))[-1]
    assert (row["reward/one"], row["reward/short"], row["reward/mean"]) == (1.0, 0.5, 2.25)


def test_samples_of_the_first_groups_are_kept(workplace, tiny_qwen2):
    rows_of(*small_run(tiny_qwen2, "eval.every=0"))
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 8 + [2] * 8  # two groups of four
    assert sum(sample["advantage"] for sample in samples[:4]) == pytest.approx(0.0, abs=1e-5)


def test_the_garbage_collector_leaves_alone_what_was_set_up(workplace, tiny_qwen2):
    with assembled(*small_run(tiny_qwen2)) as run:
        assert gc.get_freeze_count() > 100_000
        assert not any(run is each for each in gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_setting_up_is_no_steps_time(workplace, tiny_qwen2):
    with assembled(*small_run(tiny_qwen2, "train.num_steps=1")) as run:
        time.sleep(1.0)
        began = time.perf_counter()
        train(run, StopRequest(print))
        took = time.perf_counter() - began
    assert sum(row["time/total_s"] for row in read_jsonl("run/metrics.jsonl")) <= took
