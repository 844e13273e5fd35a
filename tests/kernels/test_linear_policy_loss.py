"""linear_policy_loss: the oracle, invariance to chunks and packing, the weight's gradient buffer, peak memory."""

import subprocess
import sys
import textwrap
from dataclasses import fields, replace

import pytest
import torch

from fastgrpo.kernels import chunks, reference
from fastgrpo.kernels.chunks import ChunkRows, cpu_chunk_size, gpu_chunk_rows, plan_units
from fastgrpo.kernels.heads import LinearHead
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import LossInputs, Objective
from fastgrpo.kernels.scale_gradient import scale_in_place
from fastgrpo.kernels.vocab_parallel import VocabShard
from fastgrpo.verify import cases, oracle

BACKENDS = ("torch", "triton")


def case_for(objective, dtype=torch.float32, **options):
    options = {"num_tokens": 16, "hidden_size": 16, "vocab_size": 613, "mask": "scattered"} | options
    return cases.make_case(dtype=dtype, temperature=objective.temperature, **options)


def assert_within(case, objective, errors):
    allowed = oracle.tolerances(case.hidden.dtype, cases.max_logit(case) / objective.temperature)
    beyond = {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}
    assert not beyond, f"(error, tolerance): {beyond}"


@pytest.mark.parametrize("name", cases.OBJECTIVES)
@pytest.mark.parametrize("chunk", [7, None])
def test_every_objective_in_float64(name, chunk):
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, torch.float64, num_tokens=40)
    assert_within(case, objective, oracle.check_linear_policy_loss(case, objective, chunk_size=chunk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["clip higher", "cispo", "sapo, sequence", "clip, sequence (GSPO)", "one's own", "one's own, sequence"]
)
def test_dtypes_in_chunks(name, backend, dtype):
    """Chunks of 5: the token objectives in pieces, sequences of 8 and 6 tokens with their logits computed twice."""
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, dtype)
    errors = oracle.check_linear_policy_loss(case, objective, backend=backend, chunk_size=5)
    assert_within(case, objective, errors)


@pytest.mark.parametrize("vocab_size", [1, 127, 50257, 152064])
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("triton", torch.bfloat16)])
def test_vocabularies(vocab_size, backend, dtype):
    objective = cases.OBJECTIVES["clip higher"]
    case = case_for(objective, dtype, vocab_size=vocab_size, num_tokens=16, mask="none", hidden_size=64)
    errors = oracle.check_linear_policy_loss(case, objective, backend=backend, chunk_size=8)
    assert_within(case, objective, errors)


@pytest.mark.parametrize("name", ["clip higher", "clip, sequence (GSPO)"])
def test_a_narrow_tile_costs_what_the_docs_say(name):
    """docs/kernels.md: a logit of up to 28, rounded to bfloat16, puts a logprob off by up to 4e-2."""
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, torch.bfloat16)
    assert cases.max_logit(case) < 28
    errors = oracle.check_linear_policy_loss(case, objective, backend="triton", logits_dtype=torch.bfloat16)
    wide = oracle.check_linear_policy_loss(case, objective, backend="triton")
    assert wide["logprobs"] < errors["logprobs"] <= 4e-2
    assert errors["dweight"] <= 4e-2
    assert errors["dhidden"] <= 4e-2


@pytest.mark.parametrize("name", ["clip higher", "clip, sequence (GSPO)"])
def test_strips_of_logits_share_their_gemms(name, monkeypatch):
    """Logits of 3 rows at a time, the GEMMs behind them for up to 7 rows, as on a GPU that is given no chunk size."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_, **__: ChunkRows(logits=3, gradients=7))
    widths = []
    multiply = chunks.hidden_gradient_into
    monkeypatch.setattr(
        chunks, "hidden_gradient_into", lambda out, *rest: (widths.append(len(out)), multiply(out, *rest))
    )
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, torch.bfloat16, mask="none")
    assert_within(case, objective, oracle.check_linear_policy_loss(case, objective, backend="triton"))
    assert sum(widths) == 16
    assert max(widths) > 3
    assert len(widths) <= 4
    assert_within(case, objective, oracle.check_logprobs(case, 0.9, linear=True, backend="triton"))


def test_rows_of_a_chunk_on_a_gpu():
    """An H200's: Qwen's vocabulary at H = 4096 and 2048, a sequence's chunk, a tile in place, a budget for nothing."""
    budget, bf16 = 136 * 2**30 // 124, (151936 * 4, 151936 * 2)

    def rows(bytes_per_row, hidden_size, budget=budget, strips=True):
        return gpu_chunk_rows(
            bytes_per_row=bytes_per_row,
            hidden_size=hidden_size,
            budget=budget,
            num_multiprocessors=132,
            strips=strips,
        )

    assert rows(bf16, 4096) == ChunkRows(logits=384, gradients=3072)
    assert rows(bf16, 2048) == ChunkRows(logits=512, gradients=2048)
    assert rows(bf16, 4096, strips=False) == ChunkRows(logits=1024, gradients=1024)
    assert rows((151936 * 2, 0), 4096, strips=False) == ChunkRows(logits=3072, gradients=3072)
    assert rows(bf16, 4096, budget=0) == ChunkRows(logits=256, gradients=256)


def test_rows_of_a_tile_start_where_triton_loads_vectors():
    hidden, weight = torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(50257, 4, dtype=torch.bfloat16)
    head = LinearHead(
        hidden,
        weight,
        torch.ones(2, dtype=torch.bool),
        VocabShard.of(50257, None, None),
        triton=True,
        rows=ChunkRows(logits=2, gradients=2),
        tile_dtype=torch.float32,
        temperature=1.0,
    )
    head.want_gradients(hidden=True, weight=True)
    assert head.tile.stride(0) % 16 == head.gradient_tile(head.tile, (0, 2)).stride(0) % 16 == 0


@pytest.mark.parametrize("scale", [1.0, 0.25, float("nan")])
def test_upstream_gradient_scales_in_place(scale):
    """Also rows that lie apart, and more rows than programs; the memory between them is left alone."""
    whole = torch.randn(2100, 9)
    grad, between = whole[:, :7], whole[:, 7:].clone()
    want = grad * scale
    assert scale_in_place(grad, torch.tensor(scale), backend="triton") is grad
    torch.testing.assert_close(grad, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(whole[:, 7:], between)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_padding_takes_no_part(backend):
    """Rows of the weight behind vocab_size: whatever they hold, loss and gradients are those without them."""
    objective = cases.OBJECTIVES["clip higher"]
    case = case_for(objective)
    want = linear_policy_loss(case.hidden, case.weight, case.batch, objective, backend=backend)
    want_grads = torch.autograd.grad(want.loss, (case.hidden, case.weight))
    padded = torch.cat([case.weight.detach(), torch.full((27, 16), 50.0)]).requires_grad_()
    got = linear_policy_loss(case.hidden, padded, case.batch, objective, vocab_size=613, backend=backend)
    got_grads = torch.autograd.grad(got.loss, (case.hidden, padded))
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got_grads[0], want_grads[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got_grads[1][:613], want_grads[1], rtol=1e-5, atol=1e-7)
    assert got_grads[1][613:].abs().max() == 0.0


@pytest.mark.parametrize("name", ["dual clip", "clip, sequence (GSPO)", "one's own", "one's own, sequence"])
def test_chunks_masked_tokens_and_packing_change_nothing(name):
    """The same sequences in another order, with masked tokens between them, in chunks of any size."""
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, torch.float64, num_tokens=24, mask="none")
    base = linear_policy_loss(case.hidden, case.weight, case.batch, objective)
    (base_grad,) = torch.autograd.grad(base.loss, case.weight)
    order = torch.cat([torch.arange(12, 24), torch.arange(3, 12), torch.arange(0, 3)])
    gap = torch.tensor([0] * 2)  # two masked tokens behind the first sequence
    index = torch.cat([order[:12], gap, order[12:]])
    values = {n: getattr(case.batch, n)[index] for n in (f.name for f in fields(LossInputs) if f.name != "cu_seqlens")}
    values["token_weights"][12:14] = 0.0
    packed = LossInputs(**values, cu_seqlens=torch.tensor([0, 14, 23, 26]))
    hidden = case.hidden.detach()[index]
    hidden[12:14] = torch.nan
    for chunk in (1, 5, 14, None):
        got = linear_policy_loss(hidden, case.weight, packed, objective, chunk_size=chunk)
        (grad,) = torch.autograd.grad(got.loss, case.weight)
        torch.testing.assert_close(got.loss, base.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, base_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_gets_a_gradient(backend):
    objective = Objective()
    case = case_for(objective)
    frozen = linear_policy_loss(case.hidden, case.weight.detach(), case.batch, objective, backend=backend)
    both = linear_policy_loss(case.hidden, case.weight, case.batch, objective, backend=backend)
    (alone,) = torch.autograd.grad(frozen.loss, case.hidden)
    assert torch.equal(alone, torch.autograd.grad(both.loss, (case.hidden, case.weight))[0])
    with torch.no_grad():
        nothing = linear_policy_loss(case.hidden, case.weight, case.batch, objective, backend=backend)
    assert not nothing.loss.requires_grad
    assert torch.equal(nothing.loss, both.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip higher", "clip, sequence (GSPO)"])
def test_bitwise_repeatable(backend, name):
    objective = cases.OBJECTIVES[name]

    def once():
        case = case_for(objective)
        loss = linear_policy_loss(case.hidden, case.weight, case.batch, objective, chunk_size=5, backend=backend).loss
        return loss, *torch.autograd.grad(loss, (case.hidden, case.weight))

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_gradient_buffer_receives_the_scaled_gradient_in_the_forward_pass():
    objective = cases.OBJECTIVES["clip higher"]
    case = case_for(objective)
    loss = linear_policy_loss(case.hidden, case.weight, case.batch, objective).loss
    want_hidden, want_weight = torch.autograd.grad(0.5 * loss, (case.hidden, case.weight))

    buffer = torch.ones_like(case.weight)
    case.weight.grad_added_to_main_grad = False
    options = {"grad_weight_buffer": buffer, "grad_scale": 0.5}
    loss = linear_policy_loss(case.hidden, case.weight, case.batch, objective, chunk_size=5, **options).loss
    torch.testing.assert_close(buffer, 1.0 + want_weight.detach(), rtol=1e-6, atol=1e-6)
    (0.5 * loss).backward()
    torch.testing.assert_close(case.hidden.grad, want_hidden, rtol=1e-5, atol=1e-7)
    assert case.weight.grad_added_to_main_grad is True
    assert case.weight.grad.abs().max() == 0.0

    loss = linear_policy_loss(case.hidden, case.weight, case.batch, objective, **options).loss
    (grad_hidden,) = torch.autograd.grad(loss, case.hidden)  # another upstream gradient than was promised
    assert grad_hidden.isnan().all()


@pytest.mark.parametrize("name", ["clip higher", "clip, sequence (GSPO)"])
def test_float16_keeps_the_gradient_of_small_weights(name):
    """One over a million tokens, and a loss scale that makes up for it: the gradients are those of weights near 1."""
    objective = cases.OBJECTIVES[name]
    case = case_for(objective, torch.float16)
    large = linear_policy_loss(case.hidden, case.weight, case.batch, objective, backend="triton").loss
    want = torch.autograd.grad(large, (case.hidden, case.weight))
    batch = replace(case.batch, token_weights=case.batch.token_weights * 2.0**-20)
    small = linear_policy_loss(case.hidden, case.weight, batch, objective, backend="triton").loss
    got = torch.autograd.grad(small * 2.0**20, (case.hidden, case.weight))
    assert small * 2.0**20 == large
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_plan_units():
    assert plan_units(5, 2) == [[(0, 2)], [(2, 4)], [(4, 5)]]
    assert plan_units(0, 2) == []
    assert plan_units(10, 4, [0, 1, 3, 3, 9, 10]) == [[(0, 3)], [(3, 7), (7, 9)], [(9, 10)]]
    with pytest.raises(ValueError, match="must rise from 0 to 4"):
        plan_units(4, 2, [0, 3])


def test_chunk_size_never_holds_more_than_its_share():
    for columns in (1, 512, 32768, 151936):
        rows = cpu_chunk_size(columns)
        assert rows * columns <= max(2**24, 16 * columns, 2**20)


def test_refusals():
    objective = Objective()
    case = case_for(objective)
    with pytest.raises(ValueError, match="with one H"):
        linear_policy_loss(case.hidden, case.weight[:, :3], case.batch, objective)
    with pytest.raises(ValueError, match="cast one"):
        linear_policy_loss(case.hidden, case.weight.double(), case.batch, objective)
    with pytest.raises(ValueError, match="vocab_size=614"):
        linear_policy_loss(case.hidden, case.weight, case.batch, objective, vocab_size=614)
    with pytest.raises(ValueError, match="chunk_size=0"):
        linear_policy_loss(case.hidden, case.weight, case.batch, objective, chunk_size=0)
    with pytest.raises(ValueError, match=r"logits_dtype=torch.bfloat16"):
        linear_policy_loss(case.hidden, case.weight, case.batch, objective, logits_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="grad_weight_buffer"):
        linear_policy_loss(case.hidden, case.weight, case.batch, objective, grad_weight_buffer=torch.zeros(3))
    with pytest.raises(ValueError, match=r"is outside \[0, 5\)"):
        linear_policy_loss(case.hidden, case.weight, case.batch, objective, vocab_size=5)
    loss = linear_policy_loss(case.hidden, case.weight, case.batch, objective).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


_PEAK = """
    import sys, torch
    from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
    from fastgrpo.kernels.objective import LossInputs, Objective
    torch.set_num_threads(1)
    T, H, V = 8192, 16, 32768
    hidden = torch.randn(T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    targets, ones = torch.randint(0, V, (T,)), torch.ones(T)
    batch = LossInputs(targets=targets, advantages=ones, token_weights=ones, old_logprobs=-ones)
    def peak():  # ru_maxrss would not do: it starts from the parent's, which hides as much of the growth
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    before = peak()
    if sys.argv[1] == "ours":
        loss = linear_policy_loss(hidden, weight, batch, Objective()).loss
    else:  # the least that materialised logits cost: no entropy, no objective
        loss = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).sum()
    loss.backward()
    print(peak() - before)
"""


def test_peak_memory_is_an_eighth_of_the_naive_path():
    """T = 8192, V = 32768, forward and backward, each in a process of its own: growth of the peak RSS."""

    def growth(which):
        command = [sys.executable, "-c", textwrap.dedent(_PEAK), which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    ours, naive = growth("ours"), growth("naive")
    assert naive > 2 * 8192 * 32768 * 4 / 1024  # KiB: it does hold the logits, more than once
    assert ours * 8 <= naive, f"{ours / 1024:.0f} MiB against {naive / 1024:.0f} MiB"


def test_reference_agrees_with_itself_on_both_signatures():
    objective = Objective()
    case = oracle.oracle_inputs(case_for(objective, torch.float64, mask="none"))
    logits = case.hidden @ case.weight.T
    a = reference.linear_policy_loss(case.hidden, case.weight, case.batch, objective).loss
    assert a.item() == reference.policy_loss(logits, case.batch, objective).loss.item()
