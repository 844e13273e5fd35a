"""The order of training prompts: whole epochs, seeded, resumable, without repeats in one take."""

import json

import pytest
import torch

from fastgrpo.config import UserError
from fastgrpo.data import PromptStream
from fastgrpo.types import Prompt


def prompts(n):
    return [Prompt(prompt_id=f"train/{i}", token_ids=torch.tensor([i]), text=str(i)) for i in range(n)]


def stream(n, seed=0, shuffle=True):
    return PromptStream(prompts(n), seed=seed, shuffle=shuffle)


def ids(taken):
    return [int(prompt.text) for prompt in taken]


def test_order_is_a_permutation_of_seed_and_epoch_alone():
    once = stream(6, seed=5)
    first, second = ids(once.take(6)), ids(once.take(6))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 5]
    assert first != second
    in_twos = stream(6, seed=5)
    assert [i for _ in range(6) for i in ids(in_twos.take(2))] == first + second
    assert ids(stream(6, seed=6).take(6)) != first


def test_the_order_is_the_same_on_every_machine():
    assert ids(stream(8, seed=0).take(8)) == [1, 5, 7, 2, 4, 6, 3, 0]


def test_without_shuffle_the_files_order_repeats():
    assert ids(stream(3, shuffle=False).take(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_a_take_over_the_end_of_an_epoch_repeats_nothing_and_every_epoch_is_whole():
    unshuffled = stream(5, shuffle=False)
    # Epoch 0 ends with 3, 4; epoch 1 begins 0, 1; then 2, 3, 4 end it and epoch 2 begins with 0 only.
    assert [ids(unshuffled.take(n)) for n in (3, 4, 4)] == [[0, 1, 2], [3, 4, 0, 1], [2, 3, 4, 0]]
    for seed in range(20):
        shuffled = stream(5, seed=seed)
        takes = [ids(shuffled.take(4)) for _ in range(25)]
        assert all(len(set(take)) == 4 for take in takes)
        assert {i: sum(take.count(i) for take in takes) for i in range(5)} == dict.fromkeys(range(5), 20)


def test_skipped_prompts_come_next():
    unshuffled = stream(5, shuffle=False)
    unshuffled.take(4)
    assert ids(unshuffled.take(5)) == [4, 0, 1, 2, 3]
    assert ids(unshuffled.take(2)) == [4, 0]


def test_more_than_the_data_crosses_epochs():
    assert sorted(ids(stream(3).take(7))) in ([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("taken_before", range(0, 30, 3))
def test_resume_goes_on_exactly(taken_before):
    straight = stream(7, seed=1)
    for _ in range(taken_before):
        straight.take(3)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = stream(7, seed=1)
    resumed.take(5)
    resumed.load_state_dict(state)
    assert [ids(resumed.take(3)) for _ in range(12)] == [ids(straight.take(3)) for _ in range(12)]


def test_a_state_is_a_copy():
    original = stream(5, shuffle=False)
    original.take(4)
    original.take(4)
    state = original.state_dict()
    original.take(4)
    assert state == {"num_prompts": 5, "digest": state["digest"], "epoch": 1, "position": 3, "deferred": []}


def test_an_epoch_passes_with_what_is_taken():
    slowly = stream(5)
    assert [(slowly.take(2), slowly.epoch)[1] for _ in range(5)] == [0.4, 0.8, 1.2, 1.6, 2.0]


def test_errors():
    with pytest.raises(UserError, match=r"made with 5 training prompts, the data now has 6; .*resume=no"):
        stream(6).load_state_dict(stream(5).state_dict())
    others = PromptStream(prompts(6)[1:], seed=0, shuffle=True)
    with pytest.raises(UserError, match=r"other training prompts than the checkpoint was made with, .*resume=no"):
        others.load_state_dict(stream(5).state_dict())
