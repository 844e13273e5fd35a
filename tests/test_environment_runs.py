"""Whole runs with an environment: what the policy said is learned from, what it was told is not."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import small_run
from runs import assembled, rows_of, without_clock

import fastgrpo
from fastgrpo.config import UserError
from fastgrpo.conversation import conversation
from fastgrpo.functions.loading import load_function
from fastgrpo.main import compose
from fastgrpo.metrics import read_jsonl
from fastgrpo.minibatch import make_minibatch
from fastgrpo.parcel import pack
from fastgrpo.ranks import Ranks
from fastgrpo.rollout import PACE_S, Drawing, Paced, collect, draw_whole, replies_to, score
from fastgrpo.samplers import make_sampler
from fastgrpo.trainer import compute_advantages
from fastgrpo.unfinished import Unfinished

ENVIRONMENTS = Path(__file__).with_name("example_environments.py")
# A random policy's bytes end a turn now and then.
STOPS = f"sampling.stop_token_ids=[{','.join(map(str, range(2, 70)))}]"


def open_conversations():
    """What example_environments.counts keeps."""
    return load_function(f"{ENVIRONMENTS}:counts", "environment.path").__globals__["OPEN"]


def options_of(model, *more, environment="echoes"):
    path = f"environment.path={ENVIRONMENTS}:{environment}"
    settings = (path, "environment.num_workers=0", STOPS, "sampling.max_new_tokens=24", "run.console=none")
    return small_run(model, *settings, *more)


@pytest.mark.parametrize("round_tokens", [256, 3])
def test_completions_are_conversations(workplace, tiny_qwen2, round_tokens):
    with assembled(*options_of(tiny_qwen2, f"sampler.round_tokens={round_tokens}")) as run:
        run.step = 1
        groups, row = collect(run)
        rollouts = [rollout for g in groups for rollout in g.group.rollouts]
        assert {rollout.num_turns for rollout in rollouts} >= {1, 2, 3}
        assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
        for rollout in rollouts:
            size = len(rollout.token_ids)
            assert size == len(rollout.loss_mask) == len(rollout.sampler_logprobs) <= 24
            assert rollout.finish_reason == "stop" or size == 24
            messages = conversation(rollout, run.task.decode)
            assert len(rollout.turn_ends) == sum(message["role"] == "assistant" for message in messages)
            ends = rollout.loss_mask & ~torch.cat([rollout.loss_mask[1:], torch.tensor([False])])
            assert rollout.turn_ends == ends.nonzero().flatten().tolist()
            for number, reply in enumerate(rollout.replies[:-1]):
                turn, told = messages[2 * number], messages[2 * number + 1]
                assert turn["role"] == "assistant"
                assert told == {"role": "user", "content": f"<{len(turn['content'])}/{number + 1}>"}
                assert not rollout.loss_mask[reply.start : reply.end].any()
                assert run.task.decode(rollout.token_ids[reply.start : reply.end]) == told["content"]
            told = sum(min(reply.end, size) - reply.start for reply in rollout.replies)
            assert int(rollout.loss_mask.sum()) == size - told
        assert row["turns/max"] == max(rollout.num_turns for rollout in rollouts) > row["turns/mean"] > 1
        assert row["environment/length_mean"] > 0
        assert row["environment/error_count"] == 0


def test_every_turns_logprobs_are_the_policys_after_all_that_was_said(workplace, tiny_qwen2):
    with assembled(*options_of(tiny_qwen2)) as run:
        run.step = 1
        groups, _ = collect(run)
        for g in groups:
            for rollout in g.group.rollouts:
                ids = torch.cat([g.group.prompt.token_ids, rollout.token_ids])
                scored = run.sampler.score(ids)[len(g.group.prompt.token_ids) - 1 :]
                expected = torch.where(rollout.loss_mask, scored, 0.0)
                torch.testing.assert_close(rollout.sampler_logprobs, expected, atol=2e-5, rtol=0)


def test_the_policys_tokens_alone_are_learned_from(workplace, tiny_qwen2):
    with assembled(*options_of(tiny_qwen2)) as run:
        run.step = 1
        groups, _ = collect(run)
        groups = compute_advantages(run, groups)
        batches = make_minibatch(run, groups).batches
        rollouts = [rollout for g in groups for rollout in g.group.rollouts]
        chosen = torch.cat([rollout.token_ids[rollout.loss_mask] for rollout in rollouts])
        assert torch.equal(torch.cat([b.targets for b in batches]).sort().values, chosen.sort().values)
        # One over all sequences, and in each the same for all of its tokens: the environment's count for nothing.
        assert sum(float(b.token_weights.sum()) for b in batches) == pytest.approx(1.0, abs=1e-5)
        # What was said after the policy's last word predicts nothing.
        assert sum(b.num_tokens for b in batches) <= sum(
            len(g.group.prompt.token_ids) + sum(int(r.loss_mask.nonzero()[-1]) for r in g.group.rollouts)
            for g in groups
        )


def test_a_rounds_size_changes_no_conversation(workplace, tiny_qwen2):
    with assembled(*options_of(tiny_qwen2, "data.num_problems=60")) as run:
        prompts, greedy, found = run.stream.take(40), replace(run.sampling, temperature=0.0), []
        for round_tokens in (256, 5, 1):
            run.config.sampler.round_tokens = round_tokens
            groups = draw_whole(run, prompts, Drawing(num_samples=1, params=greedy, seed=0, label="test"))
            assert [g.prompt.prompt_id for g in groups] == [p.prompt_id for p in prompts]
            rollouts = [g.rollouts[0] for g in groups]
            found.append([(r.token_ids.tolist(), r.loss_mask.tolist(), r.num_turns, r.finish_reason) for r in rollouts])
        assert found[0] == found[1] == found[2]
        assert len({turns for _, _, turns, _ in found[0]}) > 2


def test_a_rank_that_nobody_asks_has_no_workers(workplace, tiny_qwen2, monkeypatch):
    def make(*of):
        return make_sampler(*of)[0], Ranks(leads=False)

    monkeypatch.setattr("fastgrpo.assemble.make_sampler", make)
    with assembled(*options_of(tiny_qwen2), "environment.num_workers=1", "reward.num_workers=1"):
        assert multiprocessing.active_children() == []


def test_ranks_tell_each_other_what_was_drawn_and_not_what_all_know(workplace, tiny_qwen2):
    class Telling(Ranks):
        def gather(self, part):
            told.append(pack(part).numpy().tobytes())
            return super().gather(part)

    told: list[bytes] = []
    with assembled(*options_of(tiny_qwen2)) as run:
        run.sampling_ranks = Telling()
        prompts = [replace(prompt, metadata={"tests": "x" * 1000}) for prompt in run.stream.take(2)]
        groups = draw_whole(run, prompts, Drawing(num_samples=4, params=run.sampling, seed=0, label="test"))
    assert [group.prompt for group in groups] == prompts
    assert len(told) > 2
    assert not any(b"x" * 1000 in message for message in told)


@pytest.mark.parametrize(
    "more", [(), ("sampler.oversample=0.5", "sampler.round_tokens=3")], ids=["whole", "oversampled"]
)
def test_a_conversation_has_one_name_for_the_environment_and_the_reward(workplace, tiny_qwen2, more):
    """By which they find what they keep of it."""
    names = open_conversations()
    names.clear()
    in_process = ("reward.num_workers=0", f"reward.path={ENVIRONMENTS}:counted")
    rows = rows_of(*options_of(tiny_qwen2, *more, *in_process, environment="counts"))
    assert all(row["reward/max"] > 1 for row in rows if "reward/max" in row)
    going_on = {name for name in names if name != "check"}
    assert bool(going_on) == bool(more)
    assert all(name.startswith("train-") for name in going_on)


def test_turns_are_asked_about_while_others_are_drawn(workplace, tiny_qwen2, monkeypatch):
    """In the draw that they end in, and each that is answered."""
    monkeypatch.setattr("fastgrpo.rollout.PACE_S", 0.0)
    with assembled(*options_of(tiny_qwen2, "sampler.round_tokens=5")) as run:
        events, generate, environment = [], run.sampler.generate, run.task.environment
        begin, replies = environment.begin, environment.replies

        def generating(*args):
            groups = generate(*args)
            events.append("drawn")
            return groups

        def beginning(prompt, rollout):
            events.append((rollout.conversation_id, len(rollout.token_ids)))
            begin(prompt, rollout)

        def replying(turns):
            events.append({(r.conversation_id, len(r.token_ids)) for _, r in turns})
            return replies(turns)

        run.sampler.generate, environment.begin, environment.replies = generating, beginning, replying
        run.step = 1
        collect(run)
    while events:
        end = next(i for i, event in enumerate(events) if isinstance(event, set))
        begun = [event for event in events[:end] if event != "drawn"]
        assert events[end - 1] == "drawn"
        assert set(begun) == events[end]
        assert len(set(begun)) == len(begun)
        events = events[end + 1 :]


def test_completions_are_told_of_several_at_a_time(monkeypatch):
    clock, told, seen = [0.0], [], []
    monkeypatch.setattr("fastgrpo.rollout.time", SimpleNamespace(monotonic=lambda: clock[0]))
    paced = Paced(lambda prompt, rollout: told.append(rollout))
    for clock[0] in (0.2 * PACE_S, PACE_S, 1.2 * PACE_S, 1.4 * PACE_S, 3 * PACE_S, 3.5 * PACE_S):
        paced("prompt", len(seen))
        seen.append(len(told))
    assert (told, seen) == ([0, 1, 2, 3, 4], [0, 2, 2, 2, 5, 5])


def test_what_one_ranks_function_does_wrong_ends_all_ranks_with_its_line():
    class Meeting(Ranks):
        def gather(self, part):
            barrier.wait(30)
            parts[self.rank] = part
            barrier.wait(30)
            return list(parts)

    def fails_on_rank_1(rank, *_):
        if rank == 1:
            raise UserError("environment.path=tools.py: no")
        return SimpleNamespace(groups=[], metrics={})

    def ask(rank):
        asked = SimpleNamespace(replies=partial(fails_on_rank_1, rank), score=partial(fails_on_rank_1, rank))
        ranks = Meeting(rank=rank, num_ranks=2, data_rank=rank, num_data_ranks=2)
        task = SimpleNamespace(environment=asked, rewards=asked, decode=None)
        run = SimpleNamespace(task=task, sampling_ranks=ranks, ledger=nullcontext)
        lines = []
        for exchange, of in ((replies_to, Unfinished(1)), (score, [])):
            with pytest.raises(UserError) as raised:
                exchange(run, of)
            lines.append(str(raised.value))
        return lines

    barrier, parts = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(ask, range(2))) == [["environment.path=tools.py: no"] * 2] * 2


def test_turns_and_the_limit_end_a_conversation(workplace, tiny_qwen2):
    with assembled(*options_of(tiny_qwen2, "environment.max_turns=2", environment="always")) as run:
        run.step = 1
        groups, row = collect(run)
        rollouts = [rollout for g in groups for rollout in g.group.rollouts]
        assert row["turns/max"] == 2
        assert any(r.num_turns == 2 and r.finish_reason == "stop" for r in rollouts)
        assert all(len(r.replies) <= 1 for r in rollouts)


def test_a_run_learns_and_evaluates_with_its_environment(workplace, tiny_qwen2):
    rows = rows_of(*options_of(tiny_qwen2))
    assert rows[1]["turns/mean"] > 1
    assert rows[1]["sampler_mismatch/max_abs"] < 2e-5
    assert rows[1]["response_length/mean"] + rows[1]["environment/length_mean"] <= 24
    samples = read_jsonl(Path("run/samples.jsonl"))
    assert any("[user]\n<" in sample["completion"] for sample in samples if sample["kind"] == "eval")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("sampler.round_tokens=3",),
        ("sampler.oversample=0.5", "sampler.round_tokens=5", "algorithm.importance_level=token"),
    ],
    ids=["turn by turn", "in rounds", "oversampled"],
)
def test_it_resumes_bit_by_bit(workplace, tiny_qwen2, more):
    options = options_of(tiny_qwen2, *more, "train.num_steps=4", "checkpoint.every=1", "checkpoint.keep=9")
    whole = rows_of(*options)
    assert max(row["turns/max"] for row in whole[1:]) > 2
    rows_of(*options, "run.dir=other")
    again = rows_of(*options, "run.dir=other", "resume=other/checkpoints/step-000002")
    assert without_clock(whole) == without_clock(again)


def test_dynamic_sampling_and_process_rewards_take_conversations(workplace, tiny_qwen2):
    rows = rows_of(
        *options_of(tiny_qwen2, "algorithm.dynamic_sampling=true", "algorithm.max_resamples=2", "eval.every=0")
    )
    assert rows[-1]["turns/mean"] > 1


def test_a_function_from_python(workplace, tiny_qwen2):
    heard = []

    def respond(turn, answer):
        heard.append(answer)
        return "no"

    result = fastgrpo.train(
        prompts=[{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(20)],
        reward=lambda completion, conversation: len(conversation) % 3 + len(completion) % 2,
        overrides=[
            f"model.path={tiny_qwen2}",
            "reward.num_workers=0",
            "environment.num_workers=0",
            "environment.max_turns=3",
            *(STOPS, "sampling.max_new_tokens=24", "train.num_steps=1", "train.prompts_per_step=4", "eval.every=0"),
            "run.console=none",
        ],
        environment=respond,
    )
    assert result.metrics[-1]["turns/max"] == 3
    assert set(heard) <= {str(i + 1) for i in range(20)}
    with pytest.raises(UserError, match=r"the environment is a int \(3\); give a function"):
        fastgrpo.train(overrides=[f"model.path={tiny_qwen2}", "run.dir=other"], environment=3)
    for impossible in ("environment.max_turns=1", "sampling.min_new_tokens=3"):
        with pytest.raises(UserError, match=f"^{impossible}: "):
            fastgrpo.train(overrides=[f"model.path={tiny_qwen2}", impossible], environment=respond)


def test_ready_made_ones_by_name(workplace):
    config, _ = compose("train", ["environment=try_again", "environment.kwargs.says='='", "reward=gsm8k"])
    assert config.environment.path == "fastgrpo.environment.tools:try_again"
    assert config.environment.kwargs == {"grade": "fastgrpo.rewards.verifiable:gsm8k", "says": "="}
    config, _ = compose("train", ["environment=tool_calls", "environment.kwargs.functions=[tools.py:add]"])
    assert config.environment.kwargs == {"functions": ["tools.py:add"]}
    assert compose("train", [])[0].environment.path is None


def test_a_broken_environment_is_found_before_the_model_loads(workplace, tiny_qwen2):
    with (
        pytest.raises(UserError, match="raised RuntimeError: out of order"),
        assembled(*options_of(tiny_qwen2, environment="raises")),
    ):
        pass
    rows = rows_of(
        *options_of(tiny_qwen2, "environment.on_error=tell", "environment.max_turns=2", environment="raises")
    )
    assert rows[1]["environment/error_count"] > 0
