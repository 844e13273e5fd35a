"""Is the fused path computing my loss? Every objective against a float64 oracle, on this machine and dtype.

`fastgrpo verify` prints the table; tests/kernels use the same cases. The oracle is kernels/reference.py in
float64 on the same rounded inputs, so an error here is the kernel's own and not the inputs' rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.logprobs import logprobs
from fastgrpo.kernels.objective import LossInputs, LossOutput, Objective
from fastgrpo.kernels.policy_loss import policy_loss

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
MASKS = ("none", "scattered", "one_sequence", "everything")
_SHAPED: dict[str, Any] = {"kl_coef": 0.05, "entropy_coef": 0.01, "temperature": 0.9}
OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(),
    "clip higher": Objective(clip_ratio_high=0.28, **_SHAPED),
    "dual clip": Objective(dual_clip=1.5, **_SHAPED),
    "cispo": Objective(surrogate="cispo", **_SHAPED),
    "sapo": Objective(surrogate="sapo", **_SHAPED),
    "reinforce": Objective(surrogate="reinforce", **_SHAPED),
    "clip, sequence (GSPO)": Objective(ratio_level="sequence", clip_ratio_low=0.02, clip_ratio_high=0.02, **_SHAPED),
    "dual clip, sequence": Objective(ratio_level="sequence", dual_clip=1.05, **_SHAPED),
    "cispo, sequence": Objective(surrogate="cispo", ratio_level="sequence", clip_ratio_high=0.02, **_SHAPED),
    "sapo, sequence": Objective(surrogate="sapo", ratio_level="sequence", **_SHAPED),
    "clip, k1": Objective(kl_coef=0.1, kl_estimator="k1"),
    "clip, k2": Objective(kl_coef=0.1, kl_estimator="k2"),
    "clip, k1 x ratio": Objective(kl_coef=0.1, kl_estimator="k1", kl_times_ratio=True),
    "clip, k2 x ratio": Objective(kl_coef=0.1, kl_estimator="k2", kl_times_ratio=True),
    "clip, k3 x ratio": Objective(kl_coef=0.1, kl_times_ratio=True, entropy_coef=-0.01),
}


@dataclass(kw_only=True)
class VerifyConfig:
    """What to verify. The defaults take seconds on a CPU."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """The dtypes of hidden states, weights and logits; float64 too on the torch backend."""
    backend: str = "auto"
    """auto, torch or triton; see kernels/backend.py."""
    num_tokens: int = 96
    hidden_size: int = 64
    vocab_size: int = 1031
    chunk_size: int | None = 40
    """Rows of a chunk; smaller than num_tokens so that chunks are exercised. None: the kernels choose."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One quantity of one case: its error and the error it may have."""

    op: str
    objective: str
    aggregation: str
    mask: str
    dtype: str
    quantity: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True, kw_only=True)
class Case:
    """hidden (T, H), weight (V, H) and the batch that goes with them; masked tokens hold NaN throughout."""

    hidden: Tensor
    weight: Tensor
    batch: LossInputs


def make_case(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    aggregation: str = "token_mean",
    mask: str = "none",
    on_policy: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random tokens in ragged sequences (one of them empty), old and ref logprobs a little off the policy's."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    hidden = normal(num_tokens, hidden_size).to(dtype)
    weight = (normal(vocab_size, hidden_size) * (2.0 / hidden_size**0.5)).to(dtype)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=rng)
    cu = torch.tensor([0, num_tokens // 8, num_tokens // 8, num_tokens // 2, num_tokens])
    scored = _mask(mask, num_tokens, cu, rng)
    log_p = reference.linear_logprobs(hidden, weight, targets, temperature=temperature)
    assert isinstance(log_p, Tensor)
    nan = torch.nan
    batch = LossInputs(
        targets=torch.where(scored, targets, -7).to(device),
        advantages=torch.where(scored, normal(num_tokens), nan).to(device),
        token_weights=_weights(aggregation, scored, cu).to(device),
        old_logprobs=None if on_policy else torch.where(scored, log_p + 0.3 * normal(num_tokens), nan).to(device),
        ref_logprobs=torch.where(scored, log_p + 0.3 * normal(num_tokens), nan).to(device),
        importance_weights=torch.where(scored, 0.5 + torch.rand(num_tokens, generator=rng), nan).to(device),
        cu_seqlens=cu,
    )
    hidden = torch.where(scored[:, None], hidden, nan).to(device)
    return Case(hidden=hidden.requires_grad_(), weight=weight.to(device).requires_grad_(), batch=batch)


def _mask(mask: str, num_tokens: int, cu: Tensor, rng: torch.Generator) -> Tensor:
    scored = torch.ones(num_tokens, dtype=torch.bool)
    if mask == "scattered":
        scored = torch.rand(num_tokens, generator=rng) > 0.3
    elif mask == "one_sequence":
        scored[int(cu[2]) : int(cu[3])] = False
    elif mask == "everything":
        scored[:] = False
    return scored


def _weights(aggregation: str, scored: Tensor, cu: Tensor) -> Tensor:
    """(T,) the three aggregations of docs/objective.md over the scored tokens."""
    sequence = reference.sequence_of_token(cu, scored.shape[0])
    num_sequences = cu.shape[0] - 1
    lengths = torch.zeros(num_sequences).index_add_(0, sequence, scored.float()).clamp(min=1.0)
    weights = {
        "sequence_mean": 1.0 / (num_sequences * lengths[sequence]),
        "token_mean": torch.full(scored.shape, 1.0 / max(int(scored.sum()), 1)),
        "constant": torch.full(scored.shape, 1.0 / (num_sequences * 64)),
    }[aggregation]
    return torch.where(scored, weights, 0.0)


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
            importance_weights=wide(batch.importance_weights),
        ),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of what is wanted; the plain norm where nothing is wanted."""
    difference = (got.detach().cpu().double() - want.detach()).norm()
    scale = want.detach().norm()
    return (difference / scale if scale > 0 else difference).item()


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


def output_errors(got: LossOutput, want: LossOutput) -> dict[str, float]:
    """Errors of loss (over the sum of |terms| it could have), logprobs and entropies."""

    def worst(a: Tensor, b: Tensor) -> float:
        return (a.cpu().double() - b).abs().max().item() if a.numel() else 0.0

    assert got.entropy is not None
    assert want.entropy is not None
    return {
        "loss": abs(got.loss.item() - want.loss.item()) / (1.0 + abs(want.loss.item())),
        "logprobs": worst(got.logprobs, want.logprobs),
        "entropy": worst(got.entropy, want.entropy),
    }


def check_linear_policy_loss(case: Case, objective: Objective, **options: Any) -> dict[str, float]:
    """Errors of linear_policy_loss(**options) against the oracle, by quantity."""
    exact = oracle_inputs(case)
    want = reference.linear_policy_loss(exact.hidden, exact.weight, exact.batch, objective)
    want_grads = torch.autograd.grad(want.loss, (exact.hidden, exact.weight))
    got = linear_policy_loss(case.hidden, case.weight, case.batch, objective, **options)
    got_grads = torch.autograd.grad(got.loss, (case.hidden, case.weight))
    errors = output_errors(got, want)
    return errors | {n: relative(g, w) for n, g, w in zip(("dhidden", "dweight"), got_grads, want_grads, strict=True)}


def logits_of(case: Case) -> Tensor:
    """Logits (T, V) in the case's dtype, NaN rows where masked."""
    logits = case.hidden.detach().float() @ case.weight.detach().float().T
    return logits.to(case.hidden.dtype).requires_grad_()


def check_policy_loss(case: Case, objective: Objective, **options: Any) -> dict[str, float]:
    """Errors of policy_loss(**options) against the oracle, by quantity."""
    logits = logits_of(case)
    exact_logits = logits.detach().cpu().double().requires_grad_()
    exact = oracle_inputs(case)
    want = reference.policy_loss(exact_logits, exact.batch, objective)
    (want_grad,) = torch.autograd.grad(want.loss, exact_logits)
    got = policy_loss(logits, case.batch, objective, **options)
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


def run(config: VerifyConfig, objectives: dict[str, Objective] = OBJECTIVES) -> Iterator[Check]:
    """Every objective x aggregation x mask x dtype, on- and off-policy, through every op."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"backend": config.backend}
    linear_options = {**options, "chunk_size": config.chunk_size}
    grid = product(config.dtypes, AGGREGATIONS, MASKS, objectives.items(), (False, True))
    for dtype_name, aggregation, mask, (name, objective), on_policy in grid:
        dtype = getattr(torch, dtype_name)
        case = make_case(
            num_tokens=config.num_tokens,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=dtype,
            device=device,
            aggregation=aggregation,
            mask=mask,
            on_policy=on_policy,
            temperature=objective.temperature,
            seed=config.seed,
        )
        allowed = tolerances(dtype, max_logit(case) / objective.temperature)
        results = {
            "linear_policy_loss": check_linear_policy_loss(case, objective, **linear_options),
            "policy_loss": check_policy_loss(case, objective, **options),
        }
        if name == "clip" and aggregation == AGGREGATIONS[0] and not on_policy:
            results["linear_logprobs"] = check_logprobs(case, 0.9, linear=True, **linear_options)
            results["logprobs"] = check_logprobs(case, 0.9, linear=False, **options)
        label = name + (", on-policy" if on_policy else "")
        for op, errors in results.items():
            for quantity, error in errors.items():
                yield Check(
                    op=op,
                    objective=label if "policy" in op else "-",
                    aggregation=aggregation,
                    mask=mask,
                    dtype=dtype_name,
                    quantity=quantity,
                    error=error,
                    tolerance=allowed[quantity],
                )


def max_logit(case: Case) -> float:
    """The largest |logit| of the scored rows."""
    logits = case.hidden.detach().float().nan_to_num() @ case.weight.detach().float().T
    return logits.abs().max().item()


def table(checks: list[Check]) -> str:
    """A line per op, objective and dtype: the worst error of each quantity over aggregations and masks."""
    quantities = ("loss", "logprobs", "entropy", "dlogits", "dhidden", "dweight")
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.objective, check.dtype), []).append(check)
    lines = [f"{'op':<20}{'objective':<34}{'dtype':<10}" + "".join(f"{q:>20}" for q in quantities)]
    for (op, objective, dtype), members in groups.items():
        cells = []
        for quantity in quantities:
            own = [c for c in members if c.quantity == quantity]
            worst = max(own, key=lambda c: (not c.ok, c.error / c.tolerance), default=None)
            mark = "" if worst is None or worst.ok else " !"
            cells.append("" if worst is None else f"{worst.error:.1e} / {worst.tolerance:.1e}{mark}")
        lines.append(f"{op:<20}{objective:<34}{dtype:<10}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main(config: VerifyConfig | None = None) -> int:
    """Run everything, print the table of worst errors against tolerances; 0 if all hold, else 1."""
    return report(list(run(config or VerifyConfig())))


def report(checks: list[Check]) -> int:
    """Print the table and what failed; 0 if nothing did, else 1."""
    failed = [check for check in checks if not check.ok]
    print(table(checks))
    print(f"\n{len(checks)} checks, {len(failed)} failed; each cell: worst error / its tolerance")
    for check in failed[:20]:
        print(f"FAILED {check}")
    return 1 if failed else 0
