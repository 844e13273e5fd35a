"""Completions that take several steps: their bookkeeping, and runs that oversample."""

import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import small_run
from runs import assembled, without_clock

from fastgrpo.config import UserError
from fastgrpo.metrics import read_jsonl
from fastgrpo.ranks import Ranks
from fastgrpo.rollout import Drawing, collect, draw, draw_until
from fastgrpo.signals import StopRequest
from fastgrpo.trainer import train
from fastgrpo.types import Prompt, Reply, Rollout, RolloutGroup, SamplingParams
from fastgrpo.unfinished import Unfinished


def rollout(prompt_id, tokens, reason, version):
    return Rollout(
        prompt_id=prompt_id,
        token_ids=torch.tensor(tokens),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        sampler_logprobs=-0.1 * torch.tensor(tokens, dtype=torch.float32),
        finish_reason=reason,
        policy_version=version,
    )


def group(name, *rollouts, version=0):
    prompt = Prompt(prompt_id=name, token_ids=torch.tensor([7, 8]), text=name)
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollout(name, *r, version) for r in rollouts))


def routed(group, *, prompt, completions):
    """The group with numbered experts: one of one layer a token."""

    def experts(numbers):
        return torch.tensor(numbers, dtype=torch.uint8)[:, None, None]

    told = [replace(r, routed_experts=experts(e)) for r, e in zip(group.rollouts, completions, strict=True)]
    return replace(group, rollouts=tuple(told), prompt_routed_experts=experts(prompt))


def begun():
    """Limit 4, rounds of 2: one group is complete after its first, the other waits for its second completion."""
    unfinished = Unfinished(max_new_tokens=4)
    unfinished.add([group("slow", ([1], "stop"), ([2, 3], "length")), group("fast", ([4, 5], "stop"), ([6], "stop"))])
    return unfinished


def test_a_complete_group_is_taken_and_the_other_goes_on():
    unfinished = begun()
    assert (len(unfinished), unfinished.num_complete) == (2, 1)
    assert [g.prompt.prompt_id for g in unfinished.take(2)] == ["fast"]
    (prompt,) = unfinished.continuations()
    assert prompt.token_ids.tolist() == [7, 8, 2, 3]
    unfinished.extend(unfinished.news([group(prompt.prompt_id, ([9, 1], "length"), version=5)]))
    assert unfinished.continuations() == []  # at its limit
    (done,) = unfinished.take(2)
    assert len(unfinished) == 0
    first, second = done.rollouts
    assert first.token_versions.tolist() == [0]
    assert second.token_ids.tolist() == [2, 3, 9, 1]
    assert second.token_versions.tolist() == [0, 0, 5, 5]
    torch.testing.assert_close(second.sampler_logprobs, torch.tensor([-0.2, -0.3, -0.9, -0.1]))
    assert (second.finish_reason, second.policy_version, second.prompt_id) == ("length", 5, "slow")
    assert second.loss_mask.all()


def test_a_token_keeps_the_experts_of_when_the_one_after_it_was_drawn():
    unfinished, resumed = Unfinished(max_new_tokens=6), Unfinished(max_new_tokens=6)
    unfinished.add([routed(group("slow", ([2, 3], "length")), prompt=[10, 11], completions=[[12]])])
    (prompt,) = unfinished.continuations()
    more = group(prompt.prompt_id, ([9, 1, 4], "stop"))
    unfinished.extend(unfinished.news([routed(more, prompt=[20, 21, 22, 23], completions=[[24, 25]])]))
    resumed.load_state_dict(json.loads(json.dumps(unfinished.state_dict())), [replace(prompt, prompt_id="slow")])
    for each in (unfinished, resumed):
        (done,) = each.take(1)
        assert done.prompt_routed_experts.flatten().tolist() == [10, 11]
        (experts,) = (r.routed_experts for r in done.rollouts)
        assert (experts.dtype, experts.shape) == (torch.uint8, (4, 1, 1))
        assert experts.flatten().tolist() == [12, 23, 24, 25]


def test_what_was_begun_without_experts_does_not_go_on_with_them():
    unfinished = begun()
    unfinished.check_routed_experts(False)
    with pytest.raises(UserError, match=r"learner.router_replay=true: .* begun with false; resume with false"):
        unfinished.check_routed_experts(True)
    Unfinished(max_new_tokens=4).check_routed_experts(True)


def reply(start, *tokens, content="no"):
    messages = ({"role": "user", "content": content},) if tokens else ()
    return Reply(start=start, token_ids=torch.tensor(tokens, dtype=torch.int64), messages=messages)


def conversing():
    """Limit 8, three turns: one completion has ended a turn, its sibling is cut in the middle of one."""
    unfinished = Unfinished(max_new_tokens=8, max_turns=3)
    asked = group("q", ([1, 2], "stop"), ([3, 4], "length"))
    named = tuple(replace(r, conversation_id=f"train-3-0-7-{i}") for i, r in enumerate(asked.rollouts))
    unfinished.add([replace(asked, rollouts=named)])
    return unfinished


def test_a_reply_is_read_but_not_learned_from():
    unfinished = conversing()
    ((prompt, awaiting),) = unfinished.turns()
    assert (prompt.prompt_id, awaiting.token_ids.tolist()) == ("q", [1, 2])
    unfinished.reply([reply(2, 50, 51)])
    assert unfinished.turns() == []
    first, second = unfinished.continuations()
    assert (first.token_ids.tolist(), first.max_new_tokens) == ([7, 8, 1, 2, 50, 51], 4)
    assert (second.token_ids.tolist(), second.max_new_tokens) == ([7, 8, 3, 4], 6)
    ahead = [unfinished.next_turn(first, rollout("q", [5, 6], "stop", 3))]  # while the other is still drawn
    assert unfinished.next_turn(second, rollout("q", [9], "length", 3)) is None
    ahead.append(unfinished.next_turn(second, rollout("q", [9], "stop", 3)))
    assert [(p.prompt_id, r.token_ids.tolist(), r.conversation_id) for p, r in ahead] == [
        ("q", [1, 2, 50, 51, 5, 6], "train-3-0-7-0"),
        ("q", [3, 4, 9], "train-3-0-7-1"),
    ]
    assert unfinished.turns() == []
    unfinished.extend(unfinished.news([group("a", ([5, 6], "stop"), version=3), group("b", ([9], "stop"), version=3)]))
    assert unfinished.turn_places() == [0, 1]
    assert [r.token_ids.tolist() for _, r in unfinished.turns(slice(1, None, 2))] == [[3, 4, 9]]
    assert [r.token_ids.tolist() for _, r in unfinished.turns()] == [[1, 2, 50, 51, 5, 6], [3, 4, 9]]
    unfinished.reply([reply(6), reply(3)])  # the environment ends both
    (done,) = unfinished.take(1)
    said, other = done.rollouts
    assert said.loss_mask.tolist() == [True, True, False, False, True, True]
    torch.testing.assert_close(said.sampler_logprobs, torch.tensor([-0.1, -0.2, 0, 0, -0.5, -0.6]))
    assert said.token_versions.tolist() == [0, 0, 0, 0, 3, 3]
    assert (said.num_turns, other.num_turns) == (2, 1)
    assert (said.turn_ends, other.turn_ends) == ([1, 5], [2])
    assert (said.finish_reason, other.finish_reason) == ("stop", "stop")


def test_the_last_turn_and_the_limit_are_not_answered():
    unfinished = Unfinished(max_new_tokens=4, max_turns=2)
    unfinished.add([group("q", ([1], "stop"), ([2, 3, 4, 5], "stop"), ([6, 7], "length"))])
    unfinished.reply([reply(1, 50)])
    unfinished.extend(unfinished.news([group("a", ([8], "stop")), group("b", ([9, 9], "stop"))]))
    assert unfinished.turns() == []
    (done,) = unfinished.take(1)
    assert [r.num_turns for r in done.rollouts] == [2, 1, 1]


def test_a_reply_without_room_cuts_the_completion():
    unfinished = Unfinished(max_new_tokens=4, max_turns=2)
    unfinished.add([group("q", ([1, 2], "stop"))])
    unfinished.reply([reply(2, 50, 51, 52)])
    (done,) = unfinished.take(1)
    (cut,) = done.rollouts
    assert cut.token_ids.tolist() == [1, 2, 50, 51]
    assert cut.loss_mask.tolist() == [True, True, False, False]
    assert (cut.finish_reason, cut.num_turns, cut.turn_ends) == ("length", 1, [1])


def test_conversations_survive_json():
    unfinished, other = conversing(), Unfinished(max_new_tokens=8, max_turns=3)
    unfinished.reply([reply(2, 50, 51, content="é")])
    other.load_state_dict(json.loads(json.dumps(unfinished.state_dict())), [group("q").prompt])
    assert other.state_dict() == unfinished.state_dict()
    for each in (unfinished, other):
        each.extend(each.news([group("a", ([5], "stop")), group("b", ([9], "stop"))]))
        assert len(each.turns()) == 2
        _, said = each.turns()[0]
        assert said.replies[0].messages == ({"role": "user", "content": "é"},)
        assert said.loss_mask.tolist() == [True, True, False, False, True]
        assert [said.conversation_id for _, said in each.turns()] == ["train-3-0-7-0", "train-3-0-7-1"]


def test_a_replys_tokens_have_the_experts_of_the_turn_that_read_them():
    unfinished = Unfinished(max_new_tokens=9, max_turns=2)
    unfinished.add([routed(group("q", ([2, 3], "stop")), prompt=[10, 11], completions=[[12]])])
    unfinished.reply([reply(2, 50, 51)])
    (prompt,) = unfinished.continuations()
    more = group(prompt.prompt_id, ([9, 1], "stop"))
    unfinished.extend(unfinished.news([routed(more, prompt=[20, 21, 22, 23, 24, 25], completions=[[26]])]))
    (done,) = unfinished.take(1)
    (said,) = done.rollouts
    assert said.token_ids.tolist() == [2, 3, 50, 51, 9, 1]
    assert said.routed_experts.flatten().tolist() == [12, 23, 24, 25, 26]


def test_a_rank_copies_every_token_once_and_else_only_prompts_of_its_share(monkeypatch):
    class Rank(Ranks):
        def gather(self, part):
            return [part] * self.num_data_ranks  # each other rank's share looks alike

    def generate(prompts, num_samples, params, seed, on_end=None):
        shown.extend(prompt.token_ids.tolist() for prompt in prompts)
        return [group(prompt.prompt_id, ([len(prompt.token_ids)], "length")) for prompt in prompts]

    def counting_cat(parts):
        copied.append(sum(map(len, parts)))
        return cat(parts)

    shown, copied, cat, rounds = [], [], torch.cat, 40
    monkeypatch.setattr(torch, "cat", counting_cat)
    run = SimpleNamespace(
        config=SimpleNamespace(sampler=SimpleNamespace(round_tokens=1)),
        sampler=SimpleNamespace(generate=generate),
        sampling_ranks=Rank(num_ranks=4, data_rank=1, num_data_ranks=4),
        ledger=lambda name: nullcontext(),
        task=SimpleNamespace(environment=None, rewards=None),
    )
    how = Drawing(num_samples=1, params=SamplingParams(max_new_tokens=rounds), seed=0, label="test")
    asked = [group(name).prompt for name in "abcd"]
    groups = draw_until(run, Unfinished(rounds), 4, asked, how)
    completion = list(range(2, 2 + rounds))
    assert [(g.prompt.prompt_id, g.rollouts[0].token_ids.tolist()) for g in groups] == [(n, completion) for n in "abcd"]
    assert shown == [[7, 8, *completion[:said]] for said in range(rounds)]  # of "b" alone
    num_tensors = 4  # token_ids, loss_mask, sampler_logprobs, token_versions
    assert sum(copied) == sum(map(len, shown[1:])) + 4 * num_tensors * rounds


def test_what_goes_on_keeps_no_message_that_it_came_in():
    """A message holds what a rank drew of all completions in a round."""
    unfinished, message = begun(), np.array([9, 1])
    drawn = rollout("slow", [9], "length", 0)
    unfinished.extend([replace(drawn, token_ids=torch.from_numpy(message)[:1])])
    message = weakref.ref(message)
    assert message() is not None
    assert [g.prompt.prompt_id for g in unfinished.take(2)] == ["fast"]
    assert message() is None
    assert [p.token_ids.tolist() for p in unfinished.continuations()] == [[7, 8, 2, 3, 9]]


def test_the_oldest_complete_groups_come_first():
    unfinished = Unfinished(max_new_tokens=2)
    unfinished.add([group(name, ([1], "stop")) for name in "abc"])
    assert [g.prompt.prompt_id for g in unfinished.take(2)] == ["a", "b"]
    assert [g.prompt.prompt_id for g in unfinished.take(2)] == ["c"]


def test_what_is_in_flight_survives_json_bit_by_bit():
    unfinished, other = begun(), Unfinished(max_new_tokens=4)
    state = json.loads(json.dumps(unfinished.state_dict()))
    other.load_state_dict(
        state, [Prompt(prompt_id=n, token_ids=torch.tensor([7, 8]), text=n) for n in ("fast", "slow")]
    )
    assert other.state_dict() == unfinished.state_dict()
    for mine, theirs in zip(unfinished.take(9), other.take(9), strict=True):
        assert torch.equal(mine.rollouts[0].sampler_logprobs, theirs.rollouts[0].sampler_logprobs)
    assert [p.token_ids.tolist() for p in other.continuations()] == [[7, 8, 2, 3]]


def test_the_state_holds_no_number_for_every_token():
    """A step of a thousand prompts has a hundred million tokens in flight."""

    def size_of(value):
        if isinstance(value, dict | list | tuple):
            return 1 + sum(map(size_of, value.values() if isinstance(value, dict) else value))
        return 1

    sizes = []
    for length in (2, 200):
        unfinished = Unfinished(max_new_tokens=1000, max_turns=3)
        unfinished.add([group("q", (list(range(length)), "stop"))])
        unfinished.reply([reply(length, *range(length))])
        sizes.append(size_of(unfinished.state_dict()))
    assert sizes[0] == sizes[1]


def test_a_prompt_that_has_gone_is_named():
    with pytest.raises(UserError, match="in the middle of prompt slow, which the data no longer has"):
        Unfinished(max_new_tokens=4).load_state_dict(begun().state_dict(), [group("fast").prompt])


OVERSAMPLED = ("sampler.oversample=0.5", "sampler.round_tokens=2", "algorithm.importance_level=token", "eval.every=0")


def options_of(tiny_qwen2, *more):
    return small_run(tiny_qwen2, *OVERSAMPLED, "train.learning_rate=0.02", "sampling.max_new_tokens=16", *more)


def trained(options):
    with assembled(*options) as run:
        train(run, StopRequest(print))
        return run, read_jsonl(run.run_dir / "metrics.jsonl")


def test_every_group_that_is_begun_is_learned_from_once(workplace, tiny_qwen2):
    with assembled(*options_of(tiny_qwen2)) as run:
        learned, begun_in = [], {}
        for step in range(1, 7):
            run.step = step
            run.learner.policy_version = run.sampler.policy_version = step
            groups, row = collect(run)
            assert len(groups) == 4
            assert len(run.unfinished) == row["groups/unfinished"] == 2  # 4 taken of the 6 in flight
            for g in groups:
                assert {len(g.group.rollouts), len(g.rewards)} == {4}
                begun_in[g.group.prompt.prompt_id] = min(int(r.token_versions[0]) for r in g.group.rollouts)
                for r in g.group.rollouts:
                    assert len(r.token_ids) == len(r.token_versions) == len(r.sampler_logprobs) <= 16
                    assert r.token_versions.tolist() == sorted(r.token_versions.tolist())
                    assert r.finish_reason == "stop" or len(r.token_ids) == 16
            learned += [g.group.prompt.prompt_id for g in groups]
            ages = [step - v for g in groups for r in g.group.rollouts for v in r.token_versions.tolist()]
            assert (row["staleness/mean"], row["staleness/max"]) == (sum(ages) / len(ages), max(ages))  # in integers
        assert len(set(learned)) == len(learned) == 24
        assert set(begun_in.values()) >= {1, 2, 3}
        taken = run.stream.state_dict()["position"]
        assert taken == len(learned) + len(run.unfinished)  # nothing is thrown away


def test_a_continuation_is_drawn_from_the_same_distribution(workplace, tiny_qwen2):
    """Where each round's tokens are the policy's own, the learner finds the sampler's logprobs in the joined whole."""
    with assembled(*options_of(tiny_qwen2)) as run:
        run.step = 1
        groups, _ = collect(run)
        for g in groups:
            for r in g.group.rollouts:
                ids = torch.cat([g.group.prompt.token_ids, r.token_ids])
                scored = run.sampler.score(ids)[len(g.group.prompt.token_ids) - 1 :]
                torch.testing.assert_close(scored, r.sampler_logprobs, atol=2e-5, rtol=0)
        assert draw(run, [], Drawing(num_samples=1, params=run.sampling, seed=0, label="test")) == []


def test_a_run_that_oversamples_resumes_bit_by_bit(workplace, tiny_qwen2):
    options = options_of(tiny_qwen2, "checkpoint.every=1", "checkpoint.keep=9", "train.num_steps=4")
    _, whole = trained(options)
    assert max(row["staleness/max"] for row in whole[1:]) >= 1
    assert whole[-1]["importance/mean"] != 1.0
    trained([*options, "run.dir=other"])
    _, again = trained([*options, "run.dir=other", "resume=other/checkpoints/step-000002"])
    assert without_clock(whole) == without_clock(again)
    sizes = ["reward.path=sizes.py:score", "run.dir=other", "resume=other/checkpoints/step-000003"]
    Path("sizes.py").write_text("def score(completions):\n    return [len(completions)] * len(completions)\n")
    _, smaller = trained([*options, *sizes, "algorithm.group_size=2", "algorithm.advantage=mean"])
    assert 2 < smaller[-1]["reward/mean"] < 4  # of groups that were begun with four, and of new ones


def test_without_oversampling_nothing_is_in_flight(workplace, tiny_qwen2):
    run, rows = trained(small_run(tiny_qwen2, "train.num_steps=1", "eval.every=0"))
    assert len(run.unfinished) == 0
    assert "staleness/mean" not in rows[-1]
    assert all(r.token_versions is None for g in collect(run)[0] for r in g.group.rollouts)
