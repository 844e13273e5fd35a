"""logprobs and linear_logprobs: values, gradients of both outputs, properties, refusals."""

import math

import pytest
import torch

from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.logprobs import logprobs
from fastgrpo.verify import cases, oracle

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [127, 1031])
def test_against_the_oracle(backend, dtype, linear, vocab_size):
    if backend == "triton" and dtype == torch.float64:
        backend = "auto"  # refused by name, see below
    case = cases.make_case(num_tokens=12, hidden_size=16, vocab_size=vocab_size, dtype=dtype, mask="scattered")
    options = {"chunk_size": 5} if linear else {}
    errors = oracle.check_logprobs(case, 0.7, linear=linear, backend=backend, **options)
    allowed = oracle.tolerances(dtype, cases.max_logit(case) / 0.7)
    assert all(error <= allowed[name] for name, error in errors.items()), (errors, allowed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 50257, 151936, 152064])
def test_large_vocabularies(backend, vocab_size):
    case = cases.make_case(num_tokens=2, hidden_size=8, vocab_size=vocab_size, dtype=torch.float32)
    errors = oracle.check_logprobs(case, 1.0, linear=False, backend=backend)
    allowed = oracle.tolerances(torch.float32, cases.max_logit(case))
    assert all(error <= allowed[name] for name, error in errors.items()), (errors, allowed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_and_row_sums(backend):
    logits = (3.0 * torch.randn(8, 300, generator=torch.Generator().manual_seed(0))).requires_grad_()
    log_p, entropy = logprobs(logits, torch.arange(8), entropy=True, backend=backend)
    assert (log_p <= 0.0).all()
    assert ((entropy >= 0.0) & (entropy <= math.log(300))).all()
    for output in (log_p, entropy):
        (grad,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
        assert grad.sum(1).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used(backend):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([1, 2, -100])
    _, entropy = logprobs(logits, targets, entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad[2].abs().max() == 0.0
    assert grad[:2].abs().max() > 0.0
    log_p = logprobs(logits, targets, backend=backend)
    assert log_p[2] == 0.0
    assert torch.autograd.grad(log_p.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_are_the_same_with_and_without_entropy(backend):
    """Without, the kernel leaves out what the entropy needs; a row of -inf, one with a +inf and one with a NaN too."""
    logits = 5.0 * torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    logits[1, 3:] = logits[2] = -torch.inf
    logits[3, 5], logits[4, 6] = torch.inf, torch.nan
    alone = logprobs(logits, torch.arange(6), backend=backend)
    together, _ = logprobs(logits, torch.arange(6), entropy=True, backend=backend)
    assert torch.equal(alone.nan_to_num(7.0), together.nan_to_num(7.0))
    hidden, weight = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = (linear_logprobs(hidden, weight, torch.arange(6), entropy=e, backend=backend) for e in (False, True))
    assert torch.equal(next(linear), next(linear)[0])


def test_refusals():
    logits = torch.zeros(2, 4, requires_grad=True)
    targets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"targets\[1\]=4 is outside \[0, 4\)"):
        logprobs(logits, targets)
    with pytest.raises(ValueError, match="temperature=0"):
        logprobs(logits, targets, temperature=0.0)
    with pytest.raises(ValueError, match=r"must be \(T, V\)"):
        logprobs(logits, targets[:1])
    with pytest.raises(ValueError, match=r"targets \(3,\) must be \(2,\)"):
        linear_logprobs(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="computes in float32 and got float64"):
        logprobs(logits.double(), targets, backend="triton")
    log_p = logprobs(logits, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(log_p.sum(), logits, create_graph=True)
