"""Rows and micro-batches added for the schedule's sake: none of them is scored or seen."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scenario import batches_of

from fastgrpo.learner.megatron.experts import Experts, Router, for_routers
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.microbatch import pad_rows, prepare, scored_share


@pytest.mark.parametrize(
    ("layout", "given", "run"),
    [
        (Layout(), 0, 1),
        (Layout(), 3, 3),
        (Layout(pp=2), 3, 3),
        (Layout(pp=2, vpp=2), 3, 4),
        (Layout(pp=4, vpp=2), 0, 4),
        (Layout(pp=2, vpp=2), 4, 4),
        (Layout(ep=2), 3, 3),  # with nothing asked of other ranks, which pass as many
    ],
)
def test_empty_micro_batches_fill_what_the_schedule_wants(layout, given, run):
    batches = batches_of(True)[:given]
    prepared = prepare(batches, SimpleNamespace(layout=layout), torch.device("cpu"))
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


def test_padding_rows_have_experts_where_the_others_have():
    batch = batches_of(True, experts=True)[0]
    padded = pad_rows(batch, 32)
    assert len(padded.routed_experts) == padded.num_tokens
    assert torch.equal(padded.routed_experts[: batch.num_tokens], batch.routed_experts)
    assert (padded.routed_experts.diff(dim=-1) != 0).all()  # k different ones


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, torch.uint8), (300, torch.int16)])
def test_a_router_finds_its_layers_experts_among_the_bytes(num_experts, dtype):
    experts = torch.arange(num_experts - 18, num_experts).reshape(3, 3, 2).to(dtype)
    passed_on = for_routers(torch.tensor([1.0, 70000.0, 0.0]), experts)
    assert (passed_on.dtype, passed_on.shape) == (torch.bool, (1, 3, 4 + 6 * dtype.itemsize))
    notes = passed_on.transpose(0, 1).bool()[:, 0].view(torch.uint8)  # as Megatron and the router do
    assert notes[:, :4].contiguous().view(torch.float32).flatten().tolist() == [1.0, 70000.0, 0.0]
    for layer in range(3):
        config = SimpleNamespace(num_moe_experts=num_experts)
        router = SimpleNamespace(config=config, topk=2, layer_number=layer + 1)
        assert torch.equal(Router._given(router, notes), experts[:, layer].long())
    assert Router._given(router, notes[:, :4]) is None


def test_what_routers_are_told_waits_on_the_host():
    (item,) = prepare(batches_of(True, experts=True)[:1], SimpleNamespace(layout=Layout()), torch.device("meta"))
    assert (item.batch.token_ids.device.type, item.for_routers.device.type) == ("meta", "cpu")


def test_an_expert_without_rows_has_no_gradient_whatever_its_product_leaves_there(monkeypatch):
    plain = F.grouped_mm

    def spoiled(rows, weights, *, offs):
        weights.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), float("nan")))
        return plain(rows, weights, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spoiled)
    config = SimpleNamespace(
        moe_ffn_hidden_size=8, hidden_size=16, params_dtype=torch.float32, expert_model_parallel_size=1
    )
    experts = Experts(3, config, pg_collection=SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 1)))
    for param in experts.parameters():
        torch.nn.init.normal_(param)
    experts.clears_empty = True
    experts(torch.randn(5, 16), torch.tensor([2, 0, 3]), torch.ones(5))[0].sum().backward()
    for param in experts.parameters():
        assert not param.grad[1].any()
        assert param.grad[[0, 2]].flatten(1).any(1).all()


@pytest.mark.parametrize("whole_sequences", [False, True])
def test_context_parallel_ranks_share_out_the_scored_tokens(whole_sequences):
    batch = batches_of(True)[0]
    parts = []
    for rank in range(3):
        parallel = SimpleNamespace(layout=Layout(cp=3), cp_rank=rank)
        part, place = scored_share(batch, parallel, whole_sequences=whole_sequences)
        assert torch.equal(part.targets, batch.targets[place])
        assert part.ref_logprobs is None
        lengths = part.cu_scored.diff()
        assert int(lengths.sum()) == part.num_scored
        whole = batch.cu_scored.diff()
        assert bool((lengths <= whole).all())
        if whole_sequences:
            assert all(a in (0, b) for a, b in zip(lengths.tolist(), whole.tolist(), strict=True))
        else:
            assert part.num_scored - batch.num_scored // 3 in (0, 1)
        parts.append(part)
    assert torch.equal(torch.cat([part.hidden_rows for part in parts]), batch.hidden_rows)
    assert torch.equal(sum(part.cu_scored.diff() for part in parts), batch.cu_scored.diff())


def test_ranks_hold_rows_of_about_equal_cost():
    batch = batches_of(True)[0]
    ready = []
    for rank in range(2):
        parallel = SimpleNamespace(layout=Layout(cp=2), cp_rank=rank)
        (item,) = prepare([batch], parallel, torch.device("cpu"))
        ready.append(item)
    padded = pad_rows(batch, 4)
    share = padded.num_tokens // 4
    first, second, third, last = padded.token_ids.split(share)
    assert torch.equal(ready[0].batch.token_ids, torch.cat([first, last]))
    assert torch.equal(ready[1].batch.token_ids, torch.cat([second, third]))
    gathered = torch.cat([item.batch.token_ids for item in ready])
    for item in ready:
        assert torch.equal(gathered[item.batch.hidden_rows], batch.token_ids[batch.hidden_rows])
