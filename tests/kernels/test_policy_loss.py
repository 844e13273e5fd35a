"""policy_loss: every objective on both backends against the float64 oracle, and the bad inputs of the field."""

from dataclasses import replace

import pytest
import torch

from fastgrpo.kernels import reference
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective
from fastgrpo.kernels.policy_kernels import sum_kernel
from fastgrpo.kernels.policy_loss import policy_loss
from fastgrpo.verify import cases, oracle

BACKENDS = ("torch", "triton")


def assert_within(errors, dtype, max_logit):
    allowed = oracle.tolerances(dtype, max_logit)
    beyond = {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}
    assert not beyond, f"(error, tolerance): {beyond}"


def small_case(objective, dtype, **options):
    options = {"num_tokens": 16, "hidden_size": 16, "vocab_size": 613, "mask": "scattered"} | options
    return cases.make_case(dtype=dtype, temperature=objective.temperature, **options)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases.OBJECTIVES)
def test_every_objective(name, backend, on_policy):
    objective = cases.OBJECTIVES[name]
    case = small_case(objective, torch.float32, on_policy=on_policy)
    errors = oracle.check_policy_loss(case, objective, backend=backend)
    assert_within(errors, torch.float32, cases.max_logit(case) / objective.temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["clip higher", "clip, sequence (GSPO)"])
def test_half_precision(name, backend, dtype):
    objective = cases.OBJECTIVES[name]
    case = small_case(objective, dtype)
    errors = oracle.check_policy_loss(case, objective, backend=backend)
    assert_within(errors, dtype, cases.max_logit(case) / objective.temperature)


@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("aggregation", cases.AGGREGATIONS)
@pytest.mark.parametrize("name", ["dual clip", "sapo, sequence"])
def test_aggregations_and_masks_in_float64(name, aggregation, mask):
    objective = cases.OBJECTIVES[name]
    case = small_case(objective, torch.float64, aggregation=aggregation, mask=mask, num_tokens=40)
    assert_within(oracle.check_policy_loss(case, objective), torch.float64, 1.0)


@pytest.mark.parametrize("vocab_size", [1, 127, 50257, 151936, 152064])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies(vocab_size, dtype, backend):
    objective = cases.OBJECTIVES["clip higher"]
    case = small_case(objective, dtype, vocab_size=vocab_size, num_tokens=4, mask="none", hidden_size=8)
    errors = oracle.check_policy_loss(case, objective, backend=backend)
    assert_within(errors, dtype, cases.max_logit(case) / objective.temperature)


def rows_of_logits(logits, **fields):
    """A batch of one row per row of logits, target 0, weight 1."""
    count = logits.shape[0]
    defaults = {
        "targets": torch.zeros(count, dtype=torch.int64),
        "advantages": torch.ones(count),
        "token_weights": torch.ones(count),
    }
    return LossInputs(**(defaults | fields))


ADVERSARIAL = {
    "peak in the tail": lambda z: z.index_fill(1, torch.tensor([z.shape[1] - 1]), 60.0),
    "masked vocabulary": lambda z: z.index_fill(1, torch.arange(5, z.shape[1]), -torch.inf),
    "masked target": lambda z: z.index_fill(1, torch.tensor([0]), -torch.inf),
    "all equal": lambda z: torch.full_like(z, 3.0),
    "all near -200": lambda z: z - 200.0,
    "1e4": lambda z: z.sign() * 1e4,
    "largest bfloat16": lambda z: z.sign() * torch.finfo(torch.bfloat16).max,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_logits(name, backend):
    rng = torch.Generator().manual_seed(3)
    logits = ADVERSARIAL[name](torch.randn(3, 700, generator=rng))
    batch = rows_of_logits(logits, old_logprobs=torch.full((3,), -5.0), ref_logprobs=torch.full((3,), -6.0))
    kl_coef = 0.0 if name == "masked target" else 0.1  # the gradient of an infinite drift is nobody's business
    objective = Objective(kl_coef=kl_coef, entropy_coef=0.01)
    exact = logits.double().requires_grad_()
    want = reference.policy_loss(exact, batch, objective)
    (want_grad,) = torch.autograd.grad(want.loss, exact)
    got_logits = logits.clone().requires_grad_()
    got = policy_loss(got_logits, batch, objective, backend=backend)
    (got_grad,) = torch.autograd.grad(got.loss, got_logits)
    torch.testing.assert_close(got.logprobs, want.logprobs.float(), rtol=1e-6, atol=5e-6)  # -7e38 is float32's -inf
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(got.loss.double(), want.loss.detach(), rtol=1e-5, atol=1e-5)
    # a logprob at -200 or 1e4 is only known to 1e-6 of itself, and the gradient's factor e^(old - lp) with it
    assert oracle.relative(got_grad, want_grad) <= 1e-6 * max(1.0, logits[logits.isfinite()].abs().max().clamp(max=1e3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_logits_are_not_mistaken_for_improbable_ones(backend):
    logits = torch.zeros(2, 700)
    logits[0, 650] = torch.nan
    out = policy_loss(logits.requires_grad_(), rows_of_logits(logits), Objective(), backend=backend)
    assert out.logprobs.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0, -0.0])
@pytest.mark.parametrize("drift", [100.0, -100.0])
def test_drifted_tokens_stay_finite(backend, drift, advantage):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_p = reference.logprobs(logits.detach(), torch.zeros(1, dtype=torch.int64))
    fields = {"old_logprobs": log_p - drift, "ref_logprobs": log_p + drift, "advantages": torch.tensor([advantage])}
    batch = rows_of_logits(logits, **fields)
    got = policy_loss(logits, batch, Objective(kl_coef=0.1), backend=backend)
    (grad,) = torch.autograd.grad(got.loss, logits)
    want = reference.policy_loss(logits, batch, Objective(kl_coef=0.1))
    (want_grad,) = torch.autograd.grad(want.loss, logits)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(grad).all()
    assert oracle.relative(grad, want_grad.double()) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratio_exactly_at_the_edge_keeps_its_gradient(backend, advantage):
    """Two equal logits: lp = -ln 2 exactly as float32 computes it, and bounds of 1 are met with equality."""
    logits = torch.zeros(1, 2, requires_grad=True)
    log_p = reference.logprobs(logits.detach(), torch.zeros(1, dtype=torch.int64))
    batch = rows_of_logits(logits, old_logprobs=log_p, advantages=torch.tensor([advantage]))
    out = policy_loss(logits, batch, Objective(clip_ratio_low=0.0, clip_ratio_high=0.0), backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad.tolist() == [[pytest.approx(-advantage / 2), pytest.approx(advantage / 2)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties_of_the_gradient(backend):
    """Rows of dlogits sum to 0, no advantage means no gradient, a constant added to a row changes nothing."""
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 300, generator=rng)
    advantages = torch.tensor([1.0, -2.0, 0.0, -0.0])
    batch = rows_of_logits(logits, advantages=advantages, old_logprobs=torch.full((4,), -6.0))

    def gradient(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(policy_loss(z, batch, Objective(), backend=backend).loss, z)[0]

    grad = gradient(logits)
    assert grad.sum(1).abs().max() <= 1e-6
    assert grad[2:].abs().max() == 0.0
    torch.testing.assert_close(gradient(logits + 16.0), grad, rtol=2e-5, atol=2e-7)
    order = torch.randperm(300, generator=rng)
    position = int((order == 0).nonzero())
    permuted = rows_of_logits(
        logits, targets=torch.full((4,), position), advantages=advantages, old_logprobs=torch.full((4,), -6.0)
    )
    z = logits[:, order].clone().requires_grad_()
    moved = torch.autograd.grad(policy_loss(z, permuted, Objective(), backend=backend).loss, z)[0]
    torch.testing.assert_close(moved, grad[:, order], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_another_order_are_the_same_tokens(backend):
    objective = cases.OBJECTIVES["clip higher"]
    case = small_case(objective, torch.float32)
    logits = cases.logits_of(case)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    moved = logits.detach()[order].requires_grad_()
    batch = replace(case.batch.tokens_at(order), cu_seqlens=None)
    want, got = (policy_loss(z, b, objective, backend=backend) for z, b in ((logits, case.batch), (moved, batch)))
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logprobs, want.logprobs[order], rtol=0, atol=5e-6)
    (want_grad,), (got_grad,) = torch.autograd.grad(want.loss, logits), torch.autograd.grad(got.loss, moved)
    torch.testing.assert_close(got_grad, want_grad[order], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable_and_linear_in_the_upstream_gradient(backend):
    objective = cases.OBJECTIVES["clip, sequence (GSPO)"]

    def gradient(scale):
        case = small_case(objective, torch.float32)
        logits = cases.logits_of(case)
        loss = policy_loss(logits, case.batch, objective, backend=backend).loss
        return loss, torch.autograd.grad(loss * scale, logits)[0]

    (first_loss, first), (second_loss, second), (_, scaled) = gradient(1.0), gradient(1.0), gradient(4.0)
    assert torch.equal(first_loss, second_loss)
    assert torch.equal(first, second)
    assert torch.equal(scaled, 4.0 * first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_overwrites_the_logits_with_the_same_gradient(backend):
    objective = cases.OBJECTIVES["clip higher"]
    case = small_case(objective, torch.float32)
    logits = cases.logits_of(case)
    (want,) = torch.autograd.grad(policy_loss(logits, case.batch, objective, backend=backend).loss, logits)
    buffer = logits.detach().clone()
    view = buffer.view_as(buffer).requires_grad_()
    (got,) = torch.autograd.grad(policy_loss(view, case.batch, objective, backend=backend, in_place=True).loss, view)
    assert torch.equal(got, want)
    assert got.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dual clip", "one's own, sequence"])
def test_metrics_and_masked_zeros(name, backend):
    objective = cases.OBJECTIVES[name]
    case = small_case(objective, torch.float32)
    logits = cases.logits_of(case)
    got = policy_loss(logits, case.batch, objective, backend=backend)
    want = reference.policy_loss(logits, case.batch, objective)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert got.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
        assert (got.metrics[name].dtype, got.metrics[name].ndim) == (torch.float32, 0)
    masked = case.batch.token_weights == 0
    assert got.logprobs[masked].abs().max() == got.entropy[masked].abs().max() == 0.0
    without_gradient = policy_loss(logits.detach(), case.batch, objective, backend=backend)
    assert torch.equal(without_gradient.loss, got.loss)
    assert torch.equal(without_gradient.logprobs, got.logprobs)


def test_records_are_summed_in_float64():
    """More tokens than a program takes at once, and sums that float32 would round on the way."""
    records = 1e4 + torch.randn(10, 9001, generator=torch.Generator().manual_seed(0))
    sums, loss = torch.zeros(10), torch.zeros(())
    sum_kernel[(10,)](records, sums, loss, 9001, BLOCK=4096, num_warps=8)
    assert torch.equal(sums, records.double().sum(1).float())
    assert loss == sums[0]


def test_no_tokens_at_all():
    empty = torch.zeros(0)
    batch = LossInputs(targets=empty.long(), advantages=empty, token_weights=empty)
    out = policy_loss(torch.zeros(0, 5, requires_grad=True), batch, Objective())
    out.loss.backward()
    assert out.loss.item() == 0.0


def test_refusals():
    logits = torch.zeros(1, 4, requires_grad=True)
    batch = rows_of_logits(logits)
    with pytest.raises(ValueError, match="ref_logprobs is None"):
        policy_loss(logits, batch, Objective(kl_coef=0.1))
    with pytest.raises(ValueError, match="cu_seqlens is None"):
        policy_loss(logits, batch, Objective(ratio_level="sequence"))
    for asked, message in (
        ("ref_logprobs", "ref_logprobs is None: the surrogate mine"),
        ("sequences", "surrogate mine"),
    ):
        surrogate = CustomSurrogate(name="mine", function=lambda x: (x.ratio, {}), asks=frozenset({asked}))
        with pytest.raises(ValueError, match=message):
            policy_loss(logits, batch, Objective(surrogate=surrogate))
    for value, message in ((torch.ones(2), r"its value is \(2,\)"), (1.0, "its value is float; return")):
        surrogate = CustomSurrogate(name="mine", function=lambda x, value=value: (value, {}))
        with pytest.raises(ValueError, match=message):
            policy_loss(logits, batch, Objective(surrogate=surrogate))
    with pytest.raises(ValueError, match=r"targets\[0\]=4 is outside"):
        policy_loss(logits, rows_of_logits(logits, targets=torch.tensor([4])), Objective())
    with pytest.raises(ValueError, match="must be"):
        policy_loss(torch.zeros(2, 4), batch, Objective())
    with pytest.raises(ValueError, match="backend='gpu'"):
        policy_loss(logits, batch, Objective(), backend="gpu")
    with pytest.raises(ValueError, match="float64"):
        policy_loss(logits.double(), batch, Objective(), backend="triton")
    loss = policy_loss(logits, batch, Objective()).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)
    loss = policy_loss(logits, batch, Objective()).loss
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        torch.autograd.grad(loss, logits)
