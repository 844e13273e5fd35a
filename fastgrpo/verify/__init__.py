"""Is the fused path computing my loss? Every objective, and every kernel of a layer, against a float64 oracle, on this
machine and dtype.

`fastgrpo verify` prints the tables; tests/kernels use the same cases and the same oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from fastgrpo.algorithms.objective import objective_of
from fastgrpo.config import AlgorithmConfig
from fastgrpo.kernels import reference
from fastgrpo.kernels.objective import RATIO_LEVELS, Objective
from fastgrpo.kernels.segment_attention import SegmentPlan
from fastgrpo.verify.cases import AGGREGATIONS, MASKS, OBJECTIVES, Case, make_case, max_logit
from fastgrpo.verify.layers import RAGGED, TOLERANCE, Sizes, attention, layout, operations
from fastgrpo.verify.oracle import check_linear_policy_loss, check_logprobs, check_policy_loss, tolerances
from fastgrpo.verify.table import Check


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
    surrogate: str | None = None
    """FILE.py:FUNCTION: verify this surrogate of your own, with token and sequence ratios, in place of all of ours."""
    surrogate_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its fixed keyword arguments."""
    seed: int = 0


def objectives_of(config: VerifyConfig) -> dict[str, Objective]:
    """What to verify, by name. Raises UserError for a surrogate that cannot be called."""
    if config.surrogate is None:
        return OBJECTIVES
    own = AlgorithmConfig(surrogate=config.surrogate, surrogate_kwargs=config.surrogate_kwargs, entropy_coef=0.01)
    by_level = {level: replace(own, ratio_level=level) for level in RATIO_LEVELS}
    return {f"{level} ratio": objective_of(algorithm, temperature=0.9) for level, algorithm in by_level.items()}


def everything(config: VerifyConfig) -> Iterator[Check]:
    """The loss head, and unless it is about a surrogate of one's own, the kernels of a decoder layer."""
    yield from run(config)
    if config.surrogate is None:
        yield from run_layers(config)


def run_layers(config: VerifyConfig) -> Iterator[Check]:
    """Every kernel of a decoder layer x dtype, at even and at odd sizes."""
    device = torch.device(_device(config))
    even = Sizes(
        rows=config.num_tokens, hidden=config.hidden_size, ffn=3 * config.hidden_size, heads=4, kv_heads=2, head=64
    )
    odd = Sizes(rows=config.num_tokens + 1, hidden=config.hidden_size + 3, ffn=2051, heads=7, kv_heads=1, head=80)
    segments = layout(RAGGED)
    plan = SegmentPlan(segments, device)
    for name in config.dtypes:
        torch.manual_seed(config.seed)
        dtype = getattr(torch, name)
        for sizes in (even, odd):
            wide = attention(plan, segments, sizes.heads, sizes.kv_heads, sizes.head, dtype)
            for operation in (*operations(sizes, dtype, device, config.backend), wide):
                for quantity, error in operation.errors().items():
                    yield Check(
                        op=operation.name, dtype=name, quantity=quantity, error=error, tolerance=TOLERANCE[dtype]
                    )


def _device(config: VerifyConfig) -> str:
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def run(config: VerifyConfig, objectives: dict[str, Objective] | None = None) -> Iterator[Check]:
    """Every objective x aggregation x mask x dtype, on- and off-policy, through every op of the loss head."""
    objectives = objectives_of(config) if objectives is None else objectives
    device = _device(config)
    grid = product(config.dtypes, AGGREGATIONS, MASKS, objectives.items(), (False, True))
    for dtype, aggregation, mask, (name, objective), on_policy in grid:
        case = make_case(
            num_tokens=config.num_tokens,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=getattr(torch, dtype),
            device=device,
            aggregation=aggregation,
            mask=mask,
            on_policy=on_policy,
            temperature=objective.temperature,
            seed=config.seed,
        )
        allowed = tolerances(case.hidden.dtype, max_logit(case) / objective.temperature)
        label = name + (", on-policy" if on_policy else "")
        # Logprobs have no objective: once a mask and dtype is enough.
        with_logprobs = name == "clip" and aggregation == AGGREGATIONS[0] and not on_policy
        plain = _plain_errors(case, objective) if config.surrogate is not None else {}
        for op, errors in _errors_by_op(case, objective, config, with_logprobs=with_logprobs).items():
            for quantity, error in errors.items():
                yield Check(
                    op=op,
                    objective=label if "policy" in op else "-",
                    aggregation=aggregation,
                    mask=mask,
                    dtype=dtype,
                    quantity=quantity,
                    error=error,
                    tolerance=allowed[quantity] + plain.get(op, {}).get(quantity, 0.0),
                )


def _plain_errors(case: Case, objective: Objective) -> dict[str, dict[str, float]]:
    """What plain torch is off by in the same dtype: a surrogate of one's own may blow up a logprob's rounding, and no
    kernel could then be nearer."""
    return {
        "linear_policy_loss": check_linear_policy_loss(case, objective, reference.linear_policy_loss),
        "policy_loss": check_policy_loss(case, objective, reference.policy_loss),
    }


def _errors_by_op(
    case: Case, objective: Objective, config: VerifyConfig, *, with_logprobs: bool
) -> dict[str, dict[str, float]]:
    given: dict[str, Any] = {"backend": config.backend}
    linear = {**given, "chunk_size": config.chunk_size}
    errors = {
        "linear_policy_loss": check_linear_policy_loss(case, objective, **linear),
        "policy_loss": check_policy_loss(case, objective, **given),
    }
    if with_logprobs:
        errors["linear_logprobs"] = check_logprobs(case, 0.9, linear=True, **linear)
        errors["logprobs"] = check_logprobs(case, 0.9, linear=False, **given)
    return errors
