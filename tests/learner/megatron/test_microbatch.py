"""Rows and micro-batches added for the schedule's sake: none of them is scored or seen."""

import pytest
import torch
from scenario import batches_of

from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.microbatch import pad_rows, prepare


@pytest.mark.parametrize(
    ("layout", "given", "run"),
    [
        (Layout(), 0, 1),
        (Layout(), 3, 3),
        (Layout(pp=2), 3, 3),
        (Layout(pp=2, vpp=2), 3, 4),
        (Layout(pp=4, vpp=2), 0, 4),
        (Layout(pp=2, vpp=2), 4, 4),
    ],
)
def test_empty_micro_batches_fill_what_the_schedule_wants(layout, given, run):
    batches = batches_of(True)[:given]
    prepared = prepare(batches, layout, torch.device("cpu"))
    assert len(prepared) == run
    assert [item.batch.num_scored for item in prepared[given:]] == [0] * (run - given)
    assert all(torch.equal(a.token_ids, b.batch.token_ids) for a, b in zip(batches, prepared, strict=False))


def test_padding_rows_are_a_segment_that_nothing_scores_or_sees():
    batch = batches_of(True)[0]
    extra = -batch.num_tokens % 32
    assert extra
    padded = pad_rows(batch, 32)
    assert padded.num_tokens % 32 == 0
    assert padded.segments[-1].tolist() == [batch.num_tokens, padded.num_tokens, 0, 0]
    assert padded.hidden_rows.max() < batch.num_tokens
    assert padded.position_ids[-extra:].tolist() == list(range(extra))
    assert pad_rows(padded, 32) is padded
