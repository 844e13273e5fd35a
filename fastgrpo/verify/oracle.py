"""How far each op is from the oracle, and how far it may be.

The oracle is kernels/reference.py in float64 on the same rounded inputs, so an error here is the kernel's own and not
the inputs' rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.logprobs import logprobs
from fastgrpo.kernels.objective import LossOutput, Objective
from fastgrpo.kernels.policy_loss import policy_loss
from fastgrpo.verify.cases import Case, logits_of


def tolerances(dtype: torch.dtype, max_logit: float) -> dict[str, float]:
    """What each quantity may be off by: logprobs and entropies absolutely, gradients by Frobenius norm.

    A float32 logprob of the logits' size is known to 2^-23 of that size, and so is every ratio made from it:
    that is what the gradients of float32 are allowed beyond 1e-6.
    """
    if dtype == torch.float64:
        return dict.fromkeys(("logprobs", "entropy", "loss", "dlogits", "dhidden", "dweight"), 1e-12)
    per_row = 5e-6 + 1e-6 * max_logit
    exact = {"logprobs": per_row, "entropy": per_row, "loss": 1e-5}
    if dtype == torch.float32:
        return exact | {"dlogits": 1e-6 + 2.0**-23 * max_logit, "dhidden": 1e-5, "dweight": 1e-5}
    return exact | {"dlogits": 3e-3, "dhidden": 5e-3, "dweight": 5e-3}


def check_linear_policy_loss(
    case: Case, objective: Objective, op: Callable[..., LossOutput] | None = None, **options: Any
) -> dict[str, float]:
    """Errors of linear_policy_loss(**options), or of another op like it, against the oracle, by quantity."""
    exact = oracle_inputs(case)
    want = reference.linear_policy_loss(exact.hidden, exact.weight, exact.batch, objective)
    want_grads = torch.autograd.grad(want.loss, (exact.hidden, exact.weight))
    got = (op or linear_policy_loss)(case.hidden, case.weight, case.batch, objective, **options)
    got_grads = torch.autograd.grad(got.loss, (case.hidden, case.weight))
    errors = output_errors(got, want)
    return errors | {n: relative(g, w) for n, g, w in zip(("dhidden", "dweight"), got_grads, want_grads, strict=True)}


def check_policy_loss(
    case: Case, objective: Objective, op: Callable[..., LossOutput] | None = None, **options: Any
) -> dict[str, float]:
    """Errors of policy_loss(**options), or of another op like it, against the oracle, by quantity."""
    logits = logits_of(case)
    exact_logits = logits.detach().cpu().double().requires_grad_()
    exact = oracle_inputs(case)
    want = reference.policy_loss(exact_logits, exact.batch, objective)
    (want_grad,) = torch.autograd.grad(want.loss, exact_logits)
    got = (op or policy_loss)(logits, case.batch, objective, **options)
    (got_grad,) = torch.autograd.grad(got.loss, logits)
    return output_errors(got, want) | {"dlogits": relative(got_grad, want_grad)}


def check_logprobs(case: Case, temperature: float, *, linear: bool, **options: Any) -> dict[str, float]:
    """Errors of logprobs or linear_logprobs and their gradients under random upstream gradients."""
    targets = torch.where(case.batch.token_weights != 0, case.batch.targets, reference.IGNORE_INDEX)
    logits = None if linear else logits_of(case)
    inputs: tuple[Tensor, ...] = (case.hidden, case.weight) if logits is None else (logits,)
    exact = tuple(x.detach().cpu().double().requires_grad_() for x in inputs)
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, targets.shape[0], generator=rng)

    def gradients(pair: Any, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = sum((value * up.to(value)).sum() for value, up in zip(pair, upstream, strict=True))
        return torch.autograd.grad(total, leaves)

    if linear:
        scored = (targets != reference.IGNORE_INDEX).cpu()[:, None]
        want = reference.linear_logprobs(
            torch.where(scored, exact[0], 0.0), exact[1], targets.cpu(), temperature=temperature, entropy=True
        )
        got = linear_logprobs(case.hidden, case.weight, targets, temperature=temperature, entropy=True, **options)
    else:
        want = reference.logprobs(exact[0], targets.cpu(), temperature=temperature, entropy=True)
        got = logprobs(inputs[0], targets, temperature=temperature, entropy=True, **options)
    names = ("dhidden", "dweight") if linear else ("dlogits",)
    pairs = zip(names, gradients(got, inputs), gradients(want, exact), strict=True)
    errors = {name: relative(g, w) for name, g, w in pairs}
    for name, g, w in zip(("logprobs", "entropy"), got, want, strict=True):
        errors[name] = (g.detach().cpu().double() - w.detach()).abs().max().item()
    return errors


def oracle_inputs(case: Case) -> Case:
    """The same numbers in float64, on the CPU, ready to be differentiated."""
    batch = case.batch

    def wide(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.cpu().double()

    return Case(
        hidden=case.hidden.detach().cpu().double().requires_grad_(),
        weight=case.weight.detach().cpu().double().requires_grad_(),
        batch=replace(
            batch,
            targets=batch.targets.cpu(),
            advantages=batch.advantages.cpu().double(),
            token_weights=batch.token_weights.cpu().double(),
            old_logprobs=wide(batch.old_logprobs),
            ref_logprobs=wide(batch.ref_logprobs),
            sampler_logprobs=wide(batch.sampler_logprobs),
            importance_weights=wide(batch.importance_weights),
        ),
    )


def output_errors(got: LossOutput, want: LossOutput) -> dict[str, float]:
    """Errors of the loss (over 1 + |loss|), logprobs and entropies."""

    def worst(a: Tensor, b: Tensor) -> float:
        return (a.cpu().double() - b).abs().max().item() if a.numel() else 0.0

    assert got.entropy is not None
    assert want.entropy is not None
    return {
        "loss": abs(got.loss.item() - want.loss.item()) / (1.0 + abs(want.loss.item())),
        "logprobs": worst(got.logprobs, want.logprobs),
        "entropy": worst(got.entropy, want.entropy),
    }


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what is wanted; the plain norm where nothing is wanted."""
    difference = (got.detach().cpu().double() - want.detach()).norm()
    scale = want.detach().norm()
    return (difference / scale if scale > 0 else difference).item()
